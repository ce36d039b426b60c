"""The last iterations of an engine, for profiles, metrics and status: a ring in the worker process."""

from collections import deque
from typing import Any

from core.batch import IterationSample
from core.types import SliceReport
from engine.vllm.directive import Directive

_CAPACITY = 4096


class IterationLog:
    """Numbered samples; the oldest are dropped first."""

    def __init__(self) -> None:
        self._samples: deque[IterationSample] = deque(maxlen=_CAPACITY)
        self._next = 0

    def add(self, directive: Directive, report: SliceReport, forward_s: float) -> None:
        """Record one iteration as it was planned and as it was measured."""
        self._samples.append(sample_of(directive, report, forward_s, directive.overhead_s))
        self._next += 1

    def since(self, after: int) -> dict[str, Any]:
        """Samples with a number of at least `after` that are still held, and the number of the next one."""
        first = self._next - len(self._samples)
        skipped = max(0, after - first)
        samples = list(self._samples)[skipped:]
        return {"next": self._next, "samples": [sample.to_wire() for sample in samples]}


def sample_of(directive: Directive, report: SliceReport, forward_s: float, overhead_s: float) -> IterationSample:
    """One iteration: the plan in the directive, the measurements of the worker."""
    return IterationSample(
        shape=directive.shape,
        forward_s=forward_s,
        overhead_s=overhead_s,
        slices=report.slices,
        predicted_forward_s=directive.predicted_forward_s,
        finetune_budget_s=directive.finetune_budget_s,
        held_bytes=report.held_bytes,
        peak_bytes=report.peak_bytes,
        out_of_memory=report.out_of_memory,
    )
