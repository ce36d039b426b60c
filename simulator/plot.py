"""A picture of one simulation: TTFT, TBT, and what the devices did over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from core.figures import new_figure, save_figure
from simulator.statistics import Histogram, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_FROM = 5.0
"""A distribution that spans more than this factor is drawn over a logarithmic axis."""


def write_plot(result: Result, path: Path) -> None:
    """Draw cumulative distributions with their targets, and utilisation and pairs over virtual time.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = new_figure((11, 7))
    axes = figure.subplots(2, 2)
    attained = "" if result.slo_attainment is None else f", SLO attainment {result.slo_attainment:.2%}"
    trace, slo = result.trace, result.trace.args.slo
    executors = "1 executor" if trace.executors == 1 else f"{trace.executors:,} executors"
    load = f"{result.num_requests:,} requests on {executors}"
    figure.suptitle(f"{trace.name}, {trace.args.scheduler.policy}: {load}{attained}")
    _draw_cdf(axes[0][0], "time to first token", result.ttft, slo.ttft_s)
    _draw_cdf(axes[0][1], "time between tokens", result.statistics.tbt, slo.tbt_s)
    _draw_work(axes[1][0], axes[1][1], result)
    save_figure(figure, path)


def _draw_cdf(axes: Axes, title: str, histogram: Histogram, target_s: float) -> None:
    from matplotlib.ticker import StrMethodFormatter

    ends_s, shares = histogram.cdf()
    axes.set(title=title, xlabel="ms", ylabel="share", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if not ends_s:
        return
    axes.step([1000 * end_s for end_s in ends_s], shares, where="post", color="tab:blue")
    axes.axvline(
        1000 * target_s, color="tab:red", linestyle="--", linewidth=1, label=f"target {1000 * target_s:g} ms"
    )
    for percent, style in ((50, ":"), (99, "-.")):
        value_s = histogram.percentile(percent)
        if value_s is not None:
            label = f"p{percent} {1000 * value_s:.3g} ms"
            axes.axvline(1000 * value_s, color="0.4", linestyle=style, linewidth=1, label=label)
    if ends_s[-1] > _LOG_FROM * ends_s[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.set_xlim(left=0)
    axes.legend(fontsize="small")


def _draw_work(left: Axes, right: Axes, result: Result) -> None:
    """Draw utilisation and trained pairs, both over the points in time that are complete."""
    found = result.statistics
    width_s, devices_s = found.bucket_s, found.bucket_s * result.trace.executors
    buckets = range(max(1, int(result.virtual_s / width_s)))
    times_s = [(bucket + 0.5) * width_s for bucket in buckets]
    shares = [
        [per_bucket[bucket] / devices_s for bucket in buckets]
        for per_bucket in (found.forward_per_bucket, found.slices_per_bucket)
    ]
    left.stackplot(times_s, *shares, labels=["forward passes", "slices"], colors=["tab:blue", "tab:orange"])
    left.set(title=f"utilisation, {result.utilisation:.1%} in all", ylabel="share of device time", ylim=(0, 1.05))
    right.bar(times_s, [found.pairs_per_bucket[i] / width_s for i in buckets], width=width_s, color="tab:orange")
    right.axhline(result.pairs_per_s, color="0.3", linestyle="--", linewidth=1, label="mean")
    right.set(title=f"fine-tune pairs, {result.pairs_per_s:.3g}/s in all", ylabel="pairs trained per second")
    for axes in (left, right):
        axes.set_xlabel("virtual time, s")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
