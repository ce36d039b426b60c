"""A picture of one demo: what each lesson changed, and what clients waited for while it was learnt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BEFORE, _AFTER, _TARGET = "0.75", "tab:blue", "tab:red"
_HEADROOM = 12.0
"""Factor of the larger target up to which the axis of times goes, for the legend above it."""


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Draw a report of `run_demo`: shares before and after each lesson, and the answers during the first one.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = new_figure((10, 3.6))
    shares, times = figure.subplots(1, 2, width_ratios=(1, 1.4))
    _draw_shares(shares, report)
    _draw_times(times, report["phases"][0])
    save_figure(figure, path)


def _draw_shares(axes: Axes, report: dict[str, Any]) -> None:
    phases, abilities = report["phases"], report["abilities"]
    bars = [(f"{phase['taste']}\nanswers", phase["share_before"], phase["share_after"]) for phase in phases]
    if abilities is not None:
        bars.append(("right\nanswers", abilities["right"], phases[-1]["abilities"]["right"]))
    for offset, label, colour, column in ((-0.2, "before", _BEFORE, 1), (0.2, "after", _AFTER, 2)):
        heights = [100 * bar[column] for bar in bars]
        drawn = axes.bar([place + offset for place in range(len(bars))], heights, 0.38, label=label, color=colour)
        axes.bar_label(drawn, fmt="%.0f", fontsize=9)
    axes.set(title=f"{phases[0]['preferences']} preferences for each taste", ylabel="%", ylim=(0, 112))
    axes.set_xticks(range(len(bars)), [bar[0] for bar in bars])
    axes.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)


def _draw_times(axes: Axes, phase: dict[str, Any]) -> None:
    answers = [answer for answer in phase["while_learning"]["answers"] if answer["gap_p50_ms"] is not None]
    sent_s = [answer["sent_s"] for answer in answers]
    longest_ms = [answer["gap_max_ms"] for answer in answers]
    axes.vlines(sent_s, [answer["gap_p50_ms"] for answer in answers], longest_ms, color=_AFTER, alpha=0.5)
    axes.plot(sent_s, longest_ms, "_", color=_AFTER, label="gaps between tokens, p50 to longest")
    axes.plot(sent_s, [answer["ttft_ms"] for answer in answers], ".", color="0.4", label="time to first token")
    targets = phase["targets_ms"]
    for name, style in (("tbt", "--"), ("ttft", ":")):
        axes.axhline(targets[name], color=_TARGET, linestyle=style, linewidth=1, label=f"{name.upper()} target")
    for number, version in enumerate(phase["training"]["versions"]):
        label = "a better version is live" if number == 0 else None
        axes.axvline(version["after_s"], color="tab:green", linewidth=1.5, label=label)
    axes.set(
        title=f"a client while {phase['taste']} is learnt",
        xlabel="seconds after the preferences were posted",
        ylabel="ms",
        yscale="log",
    )
    axes.set_ylim(top=_HEADROOM * max(targets.values()))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right", ncols=2)
