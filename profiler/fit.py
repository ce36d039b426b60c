"""Fits a profile to measured iterations: least squares on relative errors with non-negative coefficients.

A noisy machine gives outliers, nearly always too slow. Rows are weighted by 1 / measured in a first fit, then rows
whose measured / predicted is far from its median (five median absolute deviations of the log, and at least 1.5x) are
left out and the rest is fitted again with weights 1 / predicted, which unlike 1 / measured does not favour the rows
that happened to be fast. Errors are stated on held-out rows of which none was left out.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.batch import IterationSample
from core.errors import ProfileError
from core.types import SliceKind
from profiler.profile import QUANTILE_LEVELS, FitError, LatencyModel, MemoryModel, Origin, Profile, RawSamples

_Array = NDArray[Any]
_T = TypeVar("_T")

_MAX_FORWARD_ROWS = 2000
_MAX_SLICE_ROWS = 400
"""Rows that a profile keeps of each kind of slice; it stays below some 200 kB."""
_HOLD_OUT = 0.25
_MIN_FORWARD_ROWS = 12
_MIN_HOLD_OUT_ROWS = 8
"""With fewer rows of a kind none is held out."""
_TRIM_DEVIATIONS = 5.0
_TRIM_RATIO = 1.5
_REFITS = 3
_CLASSES_PER_OCTAVE = 4
"""Rows are alike if all their features are within about a fifth of each other."""
_MIN_LIKE_ROWS = 4


@dataclass(frozen=True, slots=True)
class _Fit:
    coefficients: tuple[float, ...]
    error: FitError
    ratios: tuple[float, ...]
    noise: tuple[float, ...]


def fit_profile(
    samples: Iterable[IterationSample],
    origin: Origin,
    *,
    memory: Sequence[tuple[int, int]] = (),
    kv_bytes_per_token: int | None = None,
) -> Profile:
    """Fit every model. Empty forward passes and times that are zero, NaN or infinite are left out.

    `memory` has, for each fine-tune step, padded tokens of its largest micro-batch and the bytes it held at most. The
    seed of `origin` decides the hold-out split. Raises as `fit_raw` does.
    """
    forward: list[tuple[int, int, int, int, int, float, float]] = []
    slices: dict[SliceKind, list[tuple[int, float]]] = {}
    for sample in samples:
        shape, overhead_s = sample.shape, sample.overhead_s
        if shape.num_tokens and _is_usable(sample.forward_s):
            features = (shape.num_decode, shape.decode_context, shape.num_prefill_tokens, shape.prefill_attention)
            overhead_s = overhead_s if 0 <= overhead_s < math.inf else 0.0
            forward.append((*features, shape.num_prefills, sample.forward_s, overhead_s))
        for timing in () if sample.report.out_of_memory else sample.report.slices:
            if _is_usable(timing.latency_s):
                slices.setdefault(timing.kind, []).append((timing.num_tokens, timing.latency_s))
    raw = RawSamples(
        forward=_thin(forward, _MAX_FORWARD_ROWS),
        slices={kind: _thin(rows, _MAX_SLICE_ROWS) for kind, rows in slices.items()},
        memory=_thin(list(memory), _MAX_SLICE_ROWS),
    )
    return fit_raw(raw, origin, kv_bytes_per_token=kv_bytes_per_token)


def fit_raw(raw: RawSamples, origin: Origin, *, kv_bytes_per_token: int | None = None) -> Profile:
    """Fit again from the rows of a profile; ProfileError with fewer than a dozen forward passes."""
    if len(raw.forward) < _MIN_FORWARD_ROWS:
        raise ProfileError(f"{len(raw.forward)} forward passes are too few to fit; {_MIN_FORWARD_ROWS} are needed")
    table = np.asarray(raw.forward, dtype=float)
    features, latencies, overheads = np.column_stack([np.ones(len(table)), table[:, :5]]), table[:, 5], table[:, 6]
    forward = _fit(features, latencies, origin.seed)
    slices = {kind: _fit_slices(rows, origin.seed) for kind, rows in raw.slices.items() if rows}
    return Profile(
        origin=origin,
        latency=LatencyModel.model_validate(
            {
                "forward": forward.coefficients,
                "typical": features.max(axis=0).tolist(),
                "slices": {kind: fit.coefficients for kind, fit in slices.items()},
            }
        ),
        memory=_fit_memory(raw.memory, kv_bytes_per_token),
        forward_error=forward.error,
        slice_errors={kind: fit.error for kind, fit in slices.items()},
        forward_ratios=forward.ratios,
        slice_ratios={kind: fit.ratios for kind, fit in slices.items()},
        forward_noise=forward.noise,
        slice_noise={kind: fit.noise for kind, fit in slices.items()},
        overhead_s=float(np.median(overheads)),
        overhead_quantiles_s=_quantiles(overheads),
        samples=raw,
    )


def _is_usable(latency_s: float) -> bool:
    return 0.0 < latency_s < math.inf


def _thin(rows: list[_T], most: int) -> list[_T]:
    """A bounded part, evenly spread over time."""
    return rows if len(rows) <= most else [rows[index * len(rows) // most] for index in range(most)]


def _fit_slices(rows: Sequence[tuple[int, float]], seed: int) -> _Fit:
    table = np.asarray(rows, dtype=float)
    tokens, latencies = table[:, 0], table[:, 1]
    if np.unique(tokens).size > 1:
        return _fit(np.column_stack([np.ones(len(table)), tokens]), latencies, seed)
    # One size only: nothing tells the constant from the slope. Halves bound both, as the online model does.
    size = tokens[0]
    fit = _fit(np.ones((len(table), 1)), latencies, seed)
    whole = fit.coefficients[0]
    halves = (whole, 0.0) if size == 0 else (whole / 2, whole / 2 / size)
    return _Fit(halves, fit.error, fit.ratios, fit.noise)


def _fit(features: _Array, latencies: _Array, seed: int) -> _Fit:
    """Fit on three quarters of the rows; errors on the rest, ratios over all."""
    count = len(latencies)
    order = np.random.default_rng(seed).permutation(count)
    num_held_out = int(_HOLD_OUT * count) if count >= _MIN_HOLD_OUT_ROWS else 0
    held_out, training = order[:num_held_out], order[num_held_out:]
    coefficients = _robust_fit(features[training], latencies[training])
    predicted = np.maximum(features @ coefficients, 1e-12)
    rows = held_out if num_held_out else training
    errors = np.abs(predicted[rows] / latencies[rows] - 1.0)
    error = FitError(num_rows=num_held_out, median=float(np.median(errors)), p95=float(np.quantile(errors, 0.95)))
    ratios = latencies / predicted
    return _Fit(tuple(coefficients.tolist()), error, _quantiles(ratios), _quantiles(_noise(features, ratios)))


def _noise(features: _Array, ratios: _Array) -> _Array:
    """Ratios over the median of rows that are alike; what a linear fit misses is no noise, it comes back each time."""
    like = np.round(_CLASSES_PER_OCTAVE * np.log2(1.0 + features)).astype(int)
    _, group = np.unique(like, axis=0, return_inverse=True)
    group = group.ravel()
    noise = []
    for number in range(int(group.max()) + 1):
        members = ratios[group == number]
        if len(members) >= _MIN_LIKE_ROWS:
            noise.append(members / np.median(members))
    return np.concatenate(noise) if noise else ratios


def _robust_fit(features: _Array, latencies: _Array) -> _Array:
    coefficients = _least_squares(features, latencies, 1.0 / latencies)
    for _ in range(_REFITS):
        predicted = np.maximum(features @ coefficients, 1e-12)
        logs = np.log(latencies / predicted)
        centred = np.abs(logs - np.median(logs))
        bound = max(_TRIM_DEVIATIONS * float(np.median(centred)), float(np.log(_TRIM_RATIO)))
        kept = centred <= bound
        coefficients = _least_squares(features[kept], latencies[kept], 1.0 / predicted[kept])
    return coefficients


def _least_squares(features: _Array, latencies: _Array, weights: _Array) -> _Array:
    """Weighted, non-negative; columns are scaled first, because attention counts reach millions."""
    from sklearn.linear_model import LinearRegression

    rows = features * weights[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-300)
    solver = LinearRegression(positive=True, fit_intercept=False)
    solver.fit(rows / scale, latencies * weights)
    return np.where(features.max(axis=0) > 0, solver.coef_ / scale, 0.0)


def _fit_memory(rows: Sequence[tuple[int, int]], kv_bytes_per_token: int | None) -> MemoryModel:
    """An upper line: least squares through the peak of each size, then lifted over every row."""
    if not rows:
        return MemoryModel(arena_bytes=0.0, arena_bytes_per_token=0.0, kv_bytes_per_token=kv_bytes_per_token)
    table = np.asarray(rows, dtype=float)
    features = np.column_stack([np.ones(len(table)), table[:, 0]])
    constant, slope = _least_squares(features, table[:, 1], np.ones(len(table)))
    lift = max(0.0, float((table[:, 1] - constant - slope * table[:, 0]).max()))
    return MemoryModel(
        arena_bytes=float(constant) + lift,
        arena_bytes_per_token=float(slope),
        kv_bytes_per_token=kv_bytes_per_token,
    )


def _quantiles(values: _Array) -> tuple[float, ...]:
    return tuple(np.quantile(values, QUANTILE_LEVELS).tolist())
