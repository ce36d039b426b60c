"""From the runs to files, tables and a picture: a panel for each quantity, a colour for each policy, phases shaded."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.studies.drift.plan import TITLES, DriftPlan, Policy
from benchmarks.studies.drift.record import Point, Run, RunRecord, write_csv
from benchmarks.studies.drift.summary import summarize

_COLOURS = {  # Okabe and Ito: apart for the colour-blind too
    Policy.MACE: "#D55E00",
    Policy.NO_REWARD: "#CC79A7",
    Policy.PERIODIC: "#0072B2",
    Policy.PERIODIC_FULL: "#56B4E9",
    Policy.CONTINUOUS: "#009E73",
    Policy.FROZEN: "#555555",
}
_DASHES: dict[Policy, Any] = {Policy.NO_REWARD: "--", Policy.FROZEN: ":"}
_TARGET_STYLE: dict[str, Any] = {"color": "#222222", "linewidth": 1, "linestyle": (0, (1, 2))}
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


def write_report(records: Sequence[RunRecord], out: Path) -> dict[str, Any]:
    """Write drift.csv, drift.png and summary.json; returns the summary."""
    runs = [Run(record) for record in records]
    summary = summarize(runs)
    write_csv(runs, out / "drift.csv")
    draw(runs, summary["targets"], out / "drift.png")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def show(summary: dict[str, Any], console: Console) -> None:
    """Three tables: the phases, the whole runs, the comparisons."""
    for table in (_phases(summary), _whole_runs(summary), _comparisons(summary)):
        console.print(table)


def _phases(summary: dict[str, Any]) -> Table:
    table = Table("style", "policy", title="Each phase (means over seeds, 95 % intervals)")
    for heading in (
        "accuracy at start",
        "at end",
        "mean",
        "CLPD at end",
        "steps",
        "recovered in, s",
        "steps until",
    ):
        table.add_column(heading, justify="right")
    for phase in range(len(summary["plan"]["styles"])):
        for policy, row in summary["policies"].items():
            one = row["phases"][phase]
            low, high = one["final_accuracy_interval"]
            table.add_row(
                one["style"],
                TITLES[Policy(policy)],
                f"{one['start_accuracy']:.1%}",
                f"{one['final_accuracy']:.1%} ({low:.1%} to {high:.1%})",
                f"{one['mean_accuracy']:.1%}",
                f"{one['final_clpd']:.1f}",
                _several(one["steps"], "{:d}"),
                _several(one["recovery_s"], "{:.1f}"),
                _several(one["recovery_steps"], "{:d}"),
            )
        table.add_section()
    return table


def _whole_runs(summary: dict[str, Any]) -> Table:
    table = Table("policy", title="Whole runs")
    headings = ("mean accuracy", "steps", "pairs trained", "versions", "rejected", "requests", "failed")
    for heading in (*headings, "TTFT p50, ms", "p99", "TBT p50, ms", "p99", "right answers"):
        table.add_column(heading, justify="right")
    for policy, row in summary["policies"].items():
        stream = row["stream"]
        times = [stream[name] for name in ("ttft_p50_s", "ttft_p99_s", "tbt_p50_s", "tbt_p99_s")]
        table.add_row(
            TITLES[Policy(policy)],
            f"{row['mean_accuracy']['mean']:.1%}",
            *(f"{row[name]['mean']:.0f}" for name in ("steps", "pairs_trained", "versions", "rejected")),
            str(stream["requests"]),
            str(stream["failed"] + stream["failed_posts"]),
            *("-" if time_s is None else f"{1e3 * time_s:.0f}" for time_s in times),
            "-" if stream["right"] is None else f"{stream['right']:.1%}",
        )
    return table


def _comparisons(summary: dict[str, Any]) -> Table:
    table = Table("over the changes", "measured", "95 % interval", "expected", "", title="Comparisons")
    verdict = {True: "met", False: "missed", None: ""}
    for row in summary["comparisons"]:
        bounds = [f"{sign} {row[key]:g}" for key, sign in (("at_least", "≥"), ("at_most", "≤")) if key in row]
        low, high = ("-" if limit is None else f"{limit:.2f}" for limit in row["interval"])
        value = "-" if row["value"] is None else f"{row['value']:.2f}"
        never = row["not_recovered"]
        counts = never if isinstance(never, dict) else {"of its phases": never}
        notes = [verdict[row["passed"]]] + [f"{count} never ({side})" for side, count in counts.items() if count]
        table.add_row(
            row["what"], value, f"{low} to {high}", "".join(bounds), ", ".join(note for note in notes if note)
        )
    return table


def _several(values: list[Any], pattern: str) -> str:
    """One value for each seed; None: not within the phase."""
    return " ".join("never" if value is None else pattern.format(value) for value in values) or "-"


def draw(runs: Sequence[Run], targets: Sequence[float | None], path: Path) -> None:
    """Write the PNG: means over seeds as thick lines, single runs as thin ones.

    Args:
        runs: at least one.
        targets: accuracy that counts as recovered, by phase.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    plan = runs[0].plan
    policies = [policy for policy in Policy if any(run.policy == policy for run in runs)]
    figure = Figure(figsize=_SIZE_IN, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, 2, sharex=True)
    for axes, (title, value) in zip(grid.T.flat, _PANELS, strict=True):
        _shade(axes, plan)
        for policy in policies:
            _draw_curves(axes, [run for run in runs if run.policy == policy], value, _line_style(policy))
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.1 * (high - low))  # room for the names of the phases
        axes.set_title(title, fontsize=13, loc="left")
        axes.grid(visible=True, axis="y", alpha=0.35)
        axes.set_xlim(0, plan.duration_s)
    handles = [Line2D([], [], linewidth=2.2, **_line_style(policy)) for policy in policies]
    names = [TITLES[policy] for policy in policies]
    marked = [(phase * plan.phase_s, target) for phase, target in enumerate(targets) if target is not None]
    for began_s, target in marked:
        grid[0][0].hlines(target, began_s, began_s + plan.phase_s, **_TARGET_STYLE)
    if marked:
        handles.append(Line2D([], [], **_TARGET_STYLE))
        names.append("95 % of what continuous ends a phase with")
    for axes in grid[-1]:
        axes.set_xlabel("seconds since the first preference", fontsize=12)
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=12, frameon=False)
    figure.savefig(path, dpi=_DPI)


def _line_style(policy: Policy) -> dict[str, Any]:
    return {"color": _COLOURS[policy], "linestyle": _DASHES.get(policy, "-")}


def _shade(axes: Any, plan: DriftPlan) -> None:
    for phase, style in enumerate(plan.styles):
        began_s = phase * plan.phase_s
        axes.axvspan(began_s, began_s + plan.phase_s, color=_SHADES[phase % 2], zorder=0, linewidth=0)
        label = f"users prefer “{style.value}”"
        where = (began_s + plan.phase_s / 2, 0.985)
        axes.text(*where, label, transform=axes.get_xaxis_transform(), ha="center", va="top", color="#666666")


def _draw_curves(axes: Any, runs: Sequence[Run], value: Value, style: dict[str, Any]) -> None:
    """Each run as a step function, and their mean on a common grid of times."""
    plan = runs[0].plan
    grid_s = np.linspace(0, plan.duration_s, round(plan.duration_s / plan.poll_s) + 1)
    rows = []
    for run in runs:
        known = [(point.time_s, number) for point in run.points if (number := value(point)) is not None]
        if not known:
            continue
        times_s, values = np.array(known).T
        # The look that belongs to a moment comes a little after it.
        at = np.clip(np.searchsorted(times_s, grid_s + plan.poll_s / 2, side="right") - 1, 0, None)
        rows.append(values[at])
        if len(runs) > 1:
            axes.plot(times_s, values, linewidth=0.7, alpha=0.4, drawstyle="steps-post", **style)
    if rows:
        axes.plot(grid_s, np.mean(rows, axis=0), linewidth=2.2, drawstyle="steps-post", **style)


def _number(version: str) -> int:
    return int(version.removeprefix("v")) if version.startswith("v") else 0
