"""The engine as `/v1/training` and the metrics show it: predictions against measurements, and prefix sharing."""

import statistics
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from core.batch import IterationSample, Plan
from deployments.monitors.metrics import Meter
from engine.prefix_cache import PrefixCounts, read_prefix_counts

ReadIterations = Callable[[int], Awaitable[tuple[int, list[IterationSample]]]]
"""Iterations since a number, and the number to ask for next: `HybridEngine.iterations`."""

_WINDOW_ITERATIONS = 1024
_WINDOW_READINGS = 60
"""Readings of the prefix cache's counts; one comes each second."""


class EngineMonitor:
    """Keeps the relative errors of the last predictions, counts where the device's time went, and the sharing ratio.

    The sharing ratio is prompt tokens served from the prefix cache over all prompt tokens, by the engine's own counts.
    """

    def __init__(self, read_counts: Callable[[], PrefixCounts | None] = read_prefix_counts) -> None:
        self._read_counts = read_counts
        self._counts: deque[PrefixCounts] = deque([PrefixCounts(0, 0)], maxlen=_WINDOW_READINGS)
        self._errors: deque[float] = deque(maxlen=_WINDOW_ITERATIONS)
        self._over_budget: deque[float] = deque(maxlen=_WINDOW_ITERATIONS)
        self._num_read = 0
        self._plan = Plan()
        """The newest."""
        self._totals = {"iterations": 0, "forward_s": 0.0, "slices_s": 0.0, "overhead_s": 0.0}
        self._meter = Meter("executor")

    def begin_anew(self) -> None:
        """The engine was started anew, and counts its iterations from the first."""
        self._num_read = 0

    async def read(self, iterations: ReadIterations) -> list[IterationSample]:
        """Read the iterations since the last call, and the engine's counts; call about once a second."""
        self._num_read, samples = await iterations(self._num_read)
        self.observe(samples)
        return samples

    def observe(self, samples: list[IterationSample]) -> None:
        """Take in new iterations, and read the engine's counts."""
        if samples:
            self._plan = samples[-1].plan
        for sample in samples:
            predicted_s, is_idle = sample.plan.predicted_forward_s, not sample.shape.num_tokens
            if predicted_s is not None and not is_idle and sample.forward_s > 0:
                self._errors.append(abs(predicted_s - sample.forward_s) / sample.forward_s)
            if sample.report.slices and not is_idle:  # an idle engine has no budget to keep, only a quantum
                self._over_budget.append(max(0.0, sample.slices_s - sample.plan.finetune_budget_s))
        forward_s = sum(sample.forward_s for sample in samples if sample.shape.num_tokens)
        overhead_s = sum(sample.overhead_s for sample in samples if sample.shape.num_tokens)
        self._totals["iterations"] += len(samples)
        self._totals["forward_s"] += forward_s
        self._totals["slices_s"] += sum(sample.slices_s for sample in samples)
        self._totals["overhead_s"] += overhead_s
        self._meter.count("iterations", len(samples))
        self._meter.count("forward_seconds", forward_s)
        self._meter.count("iteration_overhead_seconds", overhead_s)
        if samples and self._errors:
            self._meter.set_gauge("forward_prediction_error", statistics.median(self._errors))
        if (counts := self._read_counts()) is not None:
            self._counts.append(counts)
            if counts.prompt_tokens:
                self._meter.set_gauge("prefix_sharing_ratio", counts.cached_tokens / counts.prompt_tokens)

    def iterations_to_wire(self) -> dict[str, Any]:
        """Counts since the start, and errors over the last iterations. Times in seconds."""
        return {
            **self._totals,
            "forward_prediction_error": _spread(self._errors),
            "slices_over_budget_s": _spread(self._over_budget),
        }

    def corrections_to_wire(self) -> dict[str, float]:
        """What training does without in the newest iteration for what clients saw: see `core.batch.Plan`."""
        plan = self._plan
        return {"gap_correction_s": plan.gap_correction_s, "first_token_share": plan.first_token_share}

    def prefix_cache_to_wire(self) -> dict[str, Any]:
        """Tokens since the start and the sharing ratio, also over the last minute; a ratio is None without prompts."""
        oldest, newest = self._counts[0], self._counts[-1]
        recent_tokens = newest.prompt_tokens - oldest.prompt_tokens
        return {
            "prompt_tokens": newest.prompt_tokens,
            "cached_tokens": newest.cached_tokens,
            "sharing_ratio": newest.cached_tokens / newest.prompt_tokens if newest.prompt_tokens else None,
            "recent_sharing_ratio": (newest.cached_tokens - oldest.cached_tokens) / recent_tokens
            if recent_tokens > 0
            else None,
        }


def _spread(values: deque[float]) -> dict[str, float] | None:
    """Median and 95th percentile; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))]}
