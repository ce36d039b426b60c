"""A picture of one simulation: TTFT, TBT, and what the devices did over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from core.config import SloConfig
from core.errors import ConfigError
from simulator.statistics import Histogram, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_FROM = 5.0
"""A distribution that spans more than this factor is drawn over a logarithmic axis."""


def write_plot(result: Result, slo: SloConfig, path: Path) -> None:
    """Draw cumulative distributions with their targets, and utilisation and pairs over virtual time.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    attained = "" if result.slo_attainment is None else f", SLO attainment {result.slo_attainment:.2%}"
    executors = "1 executor" if result.num_executors == 1 else f"{result.num_executors:,} executors"
    figure.suptitle(f"{result.name}, {result.policy}: {result.num_requests:,} requests on {executors}{attained}")
    _draw_cdf(axes[0][0], "time to first token", result.ttft, slo.ttft_s)
    _draw_cdf(axes[0][1], "time between tokens", result.statistics.tbt, slo.tbt_s)
    _draw_utilisation(axes[1][0], result)
    _draw_pairs(axes[1][1], result)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write plot {path}: {error}") from error


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


def _draw_utilisation(axes: Axes, result: Result) -> None:
    found = result.statistics
    times_s, width_s = _buckets(result)
    devices_s = width_s * result.num_executors
    forward = [found.forward_per_bucket[i] / devices_s for i in range(len(times_s))]
    slices = [found.slices_per_bucket[i] / devices_s for i in range(len(times_s))]
    axes.stackplot(
        times_s, forward, slices, labels=["forward passes", "slices"], colors=["tab:blue", "tab:orange"]
    )
    title = f"utilisation, {result.utilisation:.1%} in all"
    axes.set(title=title, xlabel="virtual time, s", ylabel="share of device time", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")


def _draw_pairs(axes: Axes, result: Result) -> None:
    times_s, width_s = _buckets(result)
    rates = [result.statistics.pairs_per_bucket[i] / width_s for i in range(len(times_s))]
    axes.bar(times_s, rates, width=width_s, color="tab:orange")
    axes.axhline(result.pairs_per_s, color="0.3", linestyle="--", linewidth=1, label="mean")
    title = f"fine-tune pairs, {result.pairs_per_s:.3g}/s in all"
    axes.set(title=title, xlabel="virtual time, s", ylabel="pairs trained per second")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")


def _buckets(result: Result) -> tuple[list[float], float]:
    """Middles of the points over time that are complete, and their width."""
    width_s = result.statistics.bucket_s
    return [(i + 0.5) * width_s for i in range(max(1, int(result.virtual_s / width_s)))], width_s
