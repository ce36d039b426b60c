"""The numbers of a window, from what the client saw. Times are in seconds, shares in 0..1.

docs/measurements/latency.md defines each of them.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from benchmarks.harness.client import RequestRecord
from benchmarks.harness.report import ms
from benchmarks.harness.statistics import mean, percentile
from benchmarks.harness.window import WindowRecord
from core.config import SloConfig


class RunMetrics(BaseModel):
    """The numbers of one run. None where there is nothing to take a statistic of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_requests: int
    num_errors: int
    """Requests that did not end with all their tokens; each misses its SLO."""
    request_rate_per_s: float
    output_tokens_per_s: float
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tbt_p50_s: float | None
    tbt_p90_s: float | None
    tbt_p99_s: float | None
    tbt_max_s: float | None
    slo_attainment: float | None
    """Share of requests that ended, with TTFT and every TBT within the targets."""
    ttft_attainment: float | None
    """Share of requests with TTFT within its target."""
    tbt_token_attainment: float | None
    """Share of gaps between tokens within the TBT target."""
    pairs_per_s: float
    """Slices' device time in the window over the mean device time of a pair, so that no step is cut off."""
    finished_pairs_per_s: float
    """Pairs of the steps that ended within the window: whole steps only."""
    num_failed_steps: int
    longest_slice_s: float
    forward_share: float
    """Device time of inference forward passes and sampling, of the window's wall time."""
    slices_share: float
    overhead_share: float
    """Scheduling and message passing of iterations that did something."""
    num_iterations: int
    num_lost_iterations: int
    """Iterations that the engine had forgotten when asked; the shares are too low if this is not 0."""
    forward_error_p50: float | None
    """Median of |predicted / measured - 1| over forward passes that were predicted."""
    merged_token_share: float
    """Tokens that came in one output with an earlier one: 0 if the client kept up."""
    send_lag_p99_s: float | None
    """How late the client sent; it counts into TTFT."""
    idle_w: float | None = None
    """Power of the machine before any load. None, as are the joules, without a sensor."""
    joules_per_1000_tokens: float | None = None
    """Over idle, of generated tokens; `profiler.energy_account` has the formula."""
    joules_per_pair: float | None = None

    @property
    def idle_share(self) -> float:
        """Share of the time in which the device runs no forward pass."""
        return 1.0 - self.forward_share


def summarize(run: WindowRecord, slo: SloConfig) -> RunMetrics:
    """All metrics of one run against SLO targets."""
    ttfts = [record.ttft_s for record in run.requests if record.ttft_s is not None]
    gaps = [gap for record in run.requests for gap in record.gaps_s]
    lags = [record.sent_s - record.scheduled_s for record in run.requests if record.sent_s is not None]
    num_tokens = len(ttfts) + len(gaps)
    training = _training_metrics(run)
    energy = {} if run.energy is None else run.energy.to_wire(num_tokens, training["pairs_per_s"] * run.covered_s)
    return RunMetrics(
        num_requests=len(run.requests),
        num_errors=sum(record.error is not None for record in run.requests),
        request_rate_per_s=len(run.requests) / run.window_s,
        output_tokens_per_s=num_tokens / run.window_s,
        **{f"ttft_p{q}_s": percentile(ttfts, q) for q in (50, 90, 99)},
        **{f"tbt_p{q}_s": percentile(gaps, q) for q in (50, 90, 99)},
        tbt_max_s=max(gaps, default=None),
        slo_attainment=mean(meets_slo(record, slo) for record in run.requests),
        ttft_attainment=mean(r.ttft_s is not None and r.ttft_s <= slo.ttft_s for r in run.requests),
        tbt_token_attainment=mean(gap <= slo.tbt_s for gap in gaps),
        merged_token_share=sum(record.num_merged_tokens for record in run.requests) / max(1, num_tokens),
        send_lag_p99_s=percentile(lags, 99),
        **training,
        **{name: energy.get(name) for name in ("idle_w", "joules_per_1000_tokens", "joules_per_pair")},
        **_device_metrics(run),
    )


def meets_slo(record: RequestRecord, slo: SloConfig) -> bool:
    """True if the request ended, with TTFT and every gap between tokens within the targets."""
    if record.error is not None or record.ttft_s is None:
        return False
    return record.ttft_s <= slo.ttft_s and max(record.gaps_s, default=0.0) <= slo.tbt_s


def summary_row(runs: Sequence[RunMetrics]) -> dict[str, Any]:
    """The median of each metric over repeats that have a value, and SLO attainment over the requests of all.

    One repeat of a slow model has too few requests to tell 0.99 from 1.
    """
    names = RunMetrics.model_fields
    columns = {name: [v for run in runs if (v := getattr(run, name)) is not None] for name in names}
    row: dict[str, Any] = {name: statistics.median(found) if found else None for name, found in columns.items()}
    met = [(r.slo_attainment * r.num_requests, r.num_requests) for r in runs if r.slo_attainment is not None]
    total = sum(count for _, count in met)
    row["pooled_slo_attainment"] = sum(part for part, _ in met) / total if total else None
    return row


def progress_line(metrics: RunMetrics) -> str:
    """The numbers of a window that its watcher wants to see at once."""
    attainment = "-" if metrics.slo_attainment is None else f"{metrics.slo_attainment:.3f}"
    latencies = {
        "TTFT p50": metrics.ttft_p50_s,
        "TTFT p99": metrics.ttft_p99_s,
        "TBT p50": metrics.tbt_p50_s,
        "TBT p99": metrics.tbt_p99_s,
    }
    told = ", ".join(f"{name} {'-' if value is None else ms(value)}" for name, value in latencies.items())
    return (
        f"attainment {attainment} of {metrics.num_requests}, {metrics.num_errors} errors, {told}, "
        f"{metrics.pairs_per_s:.2f} pairs/s, forward {metrics.forward_share:.0%}, slices {metrics.slices_share:.0%}"
    )


def _training_metrics(run: WindowRecord) -> dict[str, float | int]:
    succeeded = [task for task in run.tasks if task.error is None]
    in_window = [task for task in succeeded if 0 <= task.finished_s <= run.window_s]
    latencies_s = [timing.latency_s for sample in run.samples for timing in sample.report.slices]
    # Steps are long against the window, so counting whole ones would be off by up to one step at each end. All steps
    # of a run are alike, hence: slice time in the window / slice time of a pair. Failed steps spent time too and
    # trained nothing, so their share is taken off.
    pairs_per_s, busy_s = 0.0, sum(task.busy_s for task in succeeded)
    if busy_s > 0 and run.covered_s > 0:
        per_pair_s = busy_s / sum(task.num_pairs for task in succeeded)
        slices_s = sum(sample.slices_s for sample in run.samples)
        pairs_per_s = slices_s / per_pair_s / run.covered_s * len(succeeded) / len(run.tasks)
    return {
        "pairs_per_s": pairs_per_s,
        "finished_pairs_per_s": sum(task.num_pairs for task in in_window) / run.window_s,
        "num_failed_steps": len(run.tasks) - len(succeeded),
        "longest_slice_s": max(latencies_s, default=0.0),
    }


def _device_metrics(run: WindowRecord) -> dict[str, float | int | None]:
    errors = [
        abs(sample.plan.predicted_forward_s / sample.forward_s - 1)
        for sample in run.samples
        if sample.plan.predicted_forward_s and sample.forward_s > 0 and sample.shape.num_tokens
    ]

    def share(seconds: Iterable[float]) -> float:
        return sum(seconds) / run.covered_s if run.covered_s > 0 else 0.0

    return {
        "forward_share": share(sample.forward_s for sample in run.samples if sample.shape.num_tokens),
        "slices_share": share(sample.slices_s for sample in run.samples),
        "overhead_share": share(sample.overhead_s for sample in run.samples),
        "num_iterations": len(run.samples),
        "num_lost_iterations": run.num_lost,
        "forward_error_p50": percentile(errors, 50),
    }
