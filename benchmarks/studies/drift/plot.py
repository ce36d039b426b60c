"""The picture: one panel for each quantity, one colour for each policy, phases shaded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.studies.drift.curves import Point, Run
from benchmarks.studies.drift.plan import DriftPlan
from benchmarks.studies.drift.policies import TITLES, Policy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_NAME = "drift.png"

_COLOURS = {  # Okabe and Ito: apart for the colour-blind too
    Policy.MACE: "#D55E00",
    Policy.NO_REWARD: "#CC79A7",
    Policy.PERIODIC: "#0072B2",
    Policy.PERIODIC_FULL: "#56B4E9",
    Policy.CONTINUOUS: "#009E73",
    Policy.FROZEN: "#555555",
}
_DASHES: dict[Policy, Any] = {Policy.NO_REWARD: "--", Policy.FROZEN: ":"}
_SHADES = ("#f3f3f3", "#e2e8ef")
_SIZE_IN = (16, 11)
_DPI = 100

Value = Callable[[Point], float | None]

_PANELS: tuple[tuple[str, Value], ...] = (
    ("held-out accuracy", lambda point: point.accuracy),
    ("held-out margin (β · nats, against the base)", lambda point: point.margin),
    ("held-out CLPD (nats, sequence-level)", lambda point: point.clpd),
    ("retrain rate (training slots for each new pair)", lambda point: point.retrain_rate),
    ("optimizer steps so far", lambda point: point.steps),
    ("live adapter version", lambda point: _number(point.version)),
)


def draw(runs: Sequence[Run], targets: Sequence[float | None], path: Path) -> None:
    """Write the PNG: means over seeds as thick lines, single runs as thin ones.

    Args:
        runs: at least one.
        targets: accuracy that counts as recovered, by phase.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plan = runs[0].plan
    figure = Figure(figsize=_SIZE_IN, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, 2, sharex=True)
    for axes, (title, value) in zip(grid.T.flat, _PANELS, strict=True):
        _shade(axes, plan)
        _draw_curves(axes, runs, value)
        axes.set_title(title, fontsize=13, loc="left")
        axes.grid(visible=True, axis="y", alpha=0.35)
        axes.set_xlim(0, plan.duration_s)
    _mark_accuracy(grid[0][0], plan, targets)
    for axes in grid[-1]:
        axes.set_xlabel("seconds since the first preference", fontsize=12)
    _legend(figure, runs, with_target=any(target is not None for target in targets))
    figure.savefig(path, dpi=_DPI)


def _shade(axes: "Axes", plan: DriftPlan) -> None:
    for phase, style in enumerate(plan.styles):
        began_s = phase * plan.phase_s
        axes.axvspan(began_s, began_s + plan.phase_s, color=_SHADES[phase % 2], zorder=0, linewidth=0)
        label = f"users prefer “{style.value}”"
        where = (began_s + plan.phase_s / 2, 0.985)
        axes.text(*where, label, transform=axes.get_xaxis_transform(), ha="center", va="top", color="#666666")


def _draw_curves(axes: "Axes", runs: Sequence[Run], value: Value) -> None:
    for policy in _policies(runs):
        some = [run for run in runs if run.policy == policy]
        style: dict[str, Any] = {"color": _COLOURS[policy], "linestyle": _DASHES.get(policy, "-")}
        lines = [_line(run, value) for run in some]
        lines = [(times_s, values) for times_s, values in lines if len(times_s)]
        if not lines:
            continue
        if len(lines) > 1:
            for times_s, values in lines:
                axes.plot(times_s, values, linewidth=0.7, alpha=0.4, drawstyle="steps-post", **style)
        times_s, values = _mean(lines, runs[0].plan)
        axes.plot(times_s, values, linewidth=2.2, drawstyle="steps-post", **style)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.1 * (high - low))  # room for the names of the phases


def _line(run: Run, value: Value) -> tuple[list[float], list[float]]:
    told = [(point.time_s, value(point)) for point in run.points]
    known = [(time_s, number) for time_s, number in told if number is not None]
    return [time_s for time_s, _ in known], [number for _, number in known]


def _mean(lines: list[tuple[list[float], list[float]]], plan: DriftPlan) -> tuple[list[float], list[float]]:
    """Each line as a step function, averaged on a common grid of times."""
    grid = np.linspace(0, plan.duration_s, round(plan.duration_s / plan.poll_s) + 1)
    rows = []
    for times_s, values in lines:
        # The look that belongs to a moment comes a little after it.
        at = np.clip(np.searchsorted(times_s, grid + plan.poll_s / 2, side="right") - 1, 0, None)
        rows.append(np.array(values)[at])
    return grid.tolist(), np.mean(rows, axis=0).tolist()


def _mark_accuracy(axes: "Axes", plan: DriftPlan, targets: Sequence[float | None]) -> None:
    for phase, target in enumerate(targets):
        if target is not None:
            began_s = phase * plan.phase_s
            axes.hlines(
                target, began_s, began_s + plan.phase_s, color="#222222", linewidth=1, linestyle=(0, (1, 2))
            )


def _legend(figure: "Figure", runs: Sequence[Run], *, with_target: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_COLOURS[policy], linestyle=_DASHES.get(policy, "-"), linewidth=2.2)
        for policy in _policies(runs)
    ]
    names = [TITLES[policy] for policy in _policies(runs)]
    if with_target:
        handles.append(Line2D([], [], color="#222222", linewidth=1, linestyle=(0, (1, 2))))
        names.append("95 % of what continuous ends a phase with")
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=12, frameon=False)


def _policies(runs: Sequence[Run]) -> list[Policy]:
    there = {run.policy for run in runs}
    return [policy for policy in Policy if policy in there]


def _number(version: str) -> int:
    return int(version.removeprefix("v")) if version.startswith("v") else 0
