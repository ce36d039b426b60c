"""Predicted against measured, iteration by iteration: what `/v1/training` and the metrics tell of the scheduler."""

import statistics
from collections import deque
from typing import Any

from core.batch import IterationSample
from deployments.monitors.metrics import Meter

_WINDOW = 1024


class IterationMonitor:
    """Keeps the relative errors of the last predictions, and counts where the device's time went."""

    def __init__(self) -> None:
        self._errors: deque[float] = deque(maxlen=_WINDOW)
        self._over_budget: deque[float] = deque(maxlen=_WINDOW)
        self._meter = Meter("executor")
        self._num_iterations = 0
        self._forward_s = 0.0
        self._slices_s = 0.0
        self._overhead_s = 0.0

    def observe(self, samples: list[IterationSample]) -> None:
        """Take in the iterations since the last call."""
        if not samples:
            return
        for sample in samples:
            predicted_s = sample.plan.predicted_forward_s
            if predicted_s is not None and sample.shape.num_tokens and sample.forward_s > 0:
                self._errors.append(abs(predicted_s - sample.forward_s) / sample.forward_s)
            if (
                sample.report.slices and sample.shape.num_tokens
            ):  # an idle engine has no budget to keep, only a quantum
                self._over_budget.append(max(0.0, sample.slices_s - sample.plan.finetune_budget_s))
        forward_s = sum(sample.forward_s for sample in samples if sample.shape.num_tokens)
        slices_s = sum(sample.slices_s for sample in samples)
        overhead_s = sum(sample.overhead_s for sample in samples if sample.shape.num_tokens)
        self._num_iterations += len(samples)
        self._forward_s += forward_s
        self._slices_s += slices_s
        self._overhead_s += overhead_s
        self._meter.count("iterations", len(samples))
        self._meter.count("forward_seconds", forward_s)
        self._meter.count("iteration_overhead_seconds", overhead_s)
        if self._errors:
            self._meter.set_gauge("forward_prediction_error", statistics.median(self._errors))

    def summary(self) -> dict[str, Any]:
        """Counts since the start, and errors over the last iterations. Times in seconds."""
        return {
            "iterations": self._num_iterations,
            "forward_s": self._forward_s,
            "slices_s": self._slices_s,
            "overhead_s": self._overhead_s,
            "forward_prediction_error": _spread(self._errors),
            "slices_over_budget_s": _spread(self._over_budget),
        }


def _spread(values: deque[float]) -> dict[str, float] | None:
    """Median and 95th percentile; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))]}
