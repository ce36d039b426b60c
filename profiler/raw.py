"""From iteration samples to rows: what a profile keeps of its measurements."""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from core.batch import ForwardShape, IterationSample
from core.types import SliceKind, SliceReport, SliceTiming
from profiler.profile import MAX_FORWARD_ROWS, MAX_SLICE_ROWS, RawSamples

ForwardRow = tuple[int, int, int, int, int, float, float]
SliceRow = tuple[int, float]
T = TypeVar("T")


def latency_rows(samples: Iterable[IterationSample]) -> RawSamples:
    """Every usable measurement; empty forward passes, zero, NaN and infinite times are left out."""
    forward: list[ForwardRow] = []
    slices: dict[SliceKind, list[SliceRow]] = {}
    for sample in samples:
        shape, overhead_s = sample.shape, sample.overhead_s
        if shape.num_tokens and _is_usable(sample.forward_s):
            features = (shape.num_decode, shape.decode_context, shape.num_prefill_tokens, shape.prefill_attention)
            overhead_s = overhead_s if 0 <= overhead_s < math.inf else 0.0
            forward.append((*features, shape.num_prefills, sample.forward_s, overhead_s))
        for timing in () if sample.report.out_of_memory else sample.report.slices:
            if _is_usable(timing.latency_s):
                slices.setdefault(timing.kind, []).append((timing.num_tokens, timing.latency_s))
    return RawSamples(forward=forward, slices=slices)


def spread_rows(raw: RawSamples, memory: Sequence[tuple[int, int]] = ()) -> RawSamples:
    """A bounded part, evenly spread over time, so that a profile stays below some 200 kB."""
    return RawSamples(
        forward=_thin(raw.forward, MAX_FORWARD_ROWS),
        slices={kind: _thin(rows, MAX_SLICE_ROWS) for kind, rows in raw.slices.items()},
        memory=_thin(list(memory) or raw.memory, MAX_SLICE_ROWS),
    )


def samples_of(raw: RawSamples) -> list[IterationSample]:
    """Iterations that would leave these rows: forward passes first, then one slice each."""
    samples = [IterationSample(ForwardShape(*row[:5]), forward_s=row[5], overhead_s=row[6]) for row in raw.forward]
    for kind, rows in raw.slices.items():
        samples += [
            IterationSample(ForwardShape(), 0.0, report=SliceReport([SliceTiming(kind, tokens, latency_s)]))
            for tokens, latency_s in rows
        ]
    return samples


def _is_usable(latency_s: float) -> bool:
    return 0.0 < latency_s < math.inf


def _thin(rows: list[T], most: int) -> list[T]:
    if len(rows) <= most:
        return rows
    return [rows[index * len(rows) // most] for index in range(most)]
