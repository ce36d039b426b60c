"""From the runs to files, tables and a picture: a panel for each quantity, a colour for each policy, phases shaded."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.harness.report import Column, checks_table, digits, ms, percent, table_of
from benchmarks.studies.drift.plan import POLICIES, DriftPlan, Policy
from benchmarks.studies.drift.record import BASE, Run, write_csv
from benchmarks.studies.drift.summary import summarize
from core.figures import new_figure

_TARGET_STYLE: dict[str, Any] = {"color": "#222222", "linewidth": 1, "linestyle": (0, (1, 2))}
_SHADES = ("#f3f3f3", "#e2e8ef")
_SIZE_IN = (16, 11)
_DPI = 100

_PANELS = {
    "accuracy": "held-out accuracy",
    "margin": "held-out margin (β · nats, against the base)",
    "clpd": "held-out CLPD (nats, sequence-level)",
    "retrain_rate": "retrain rate (training slots for each new pair)",
    "steps": "optimizer steps so far",
    "version": "live adapter version",
}
"""Titles by column of the table."""


def _each_seed(pattern: str) -> Callable[[list[Any]], str]:
    """Text of one value for each seed; None: not within the phase."""
    return lambda values: " ".join("never" if v is None else pattern.format(v) for v in values) or "-"


_PHASES: tuple[Column, ...] = (
    ("style", "style", str),
    ("policy", "policy", str),
    ("accuracy at start", "start_accuracy", percent),
    ("at end", "final_accuracy", percent),
    ("95 % interval", "final_accuracy_interval", lambda bounds: " to ".join(map(percent, bounds))),
    ("mean", "mean_accuracy", percent),
    ("CLPD at end", "final_clpd", digits(1)),
    ("steps", "steps", _each_seed("{:d}")),
    ("recovered in, s", "recovery_s", _each_seed("{:.1f}")),
    ("steps until", "recovery_steps", _each_seed("{:d}")),
)
_WHOLE_RUNS: tuple[Column, ...] = (
    ("policy", "policy", str),
    ("mean accuracy", "mean_accuracy", percent),
    *((name.replace("_", " "), name, digits(0)) for name in ("steps", "pairs_trained", "versions", "rejected")),
    ("requests", "requests", str),
    ("failed", "failed", str),
    *((f"{name.upper()} p{q}", f"{name}_p{q}_s", ms) for name in ("ttft", "tbt") for q in (50, 99)),
    ("right answers", "right", percent),
)


def write_report(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """Write drift.csv, drift.png and summary.json; returns the summary."""
    summary = summarize(runs)
    write_csv(runs, out / "drift.csv")
    draw(runs, summary["targets"], out / "drift.png")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def tables(summary: dict[str, Any]) -> list[Table]:
    """Three tables: the phases, the whole runs, the comparisons."""
    policies = {POLICIES[Policy(policy)].title: row for policy, row in summary["policies"].items()}
    phases = [
        {**row["phases"][phase], "policy": title}
        for phase in range(len(summary["plan"]["styles"]))
        for title, row in policies.items()
    ]
    whole = []
    for title, row in policies.items():
        means = {key: value["mean"] for key, value in row.items() if isinstance(value, dict) and "mean" in value}
        failed = row["stream"]["failed"] + row["stream"]["failed_posts"]
        whole.append({**row["stream"], **means, "policy": title, "failed": failed})
    return [
        table_of("Each phase (means over seeds)", phases, _PHASES),
        table_of("Whole runs", whole, _WHOLE_RUNS),
        checks_table("over the changes", ({**row, "check": _check(row)} for row in summary["comparisons"])),
    ]


def _check(row: dict[str, Any]) -> str:
    """Name a comparison, and say for how many of its phases a policy never recovered."""
    never = row["not_recovered"]
    counts = never if isinstance(never, dict) else {"of its phases": never}
    notes = [f"{count} never ({side})" for side, count in counts.items() if count]
    return ", ".join([row["what"], *notes])


def draw(runs: Sequence[Run], targets: Sequence[float | None], path: Path) -> None:
    """Write the PNG: means over seeds as thick lines, single runs as thin ones.

    Args:
        runs: at least one.
        targets: accuracy that counts as recovered, by phase.
        path: of the PNG.
    """
    from matplotlib.lines import Line2D

    plan = runs[0].plan
    policies = [policy for policy in Policy if any(run.policy == policy for run in runs)]
    figure = new_figure(_SIZE_IN)
    grid = figure.subplots(3, 2, sharex=True)
    for axes, (column, title) in zip(grid.T.flat, _PANELS.items(), strict=True):
        _shade(axes, plan)
        for policy in policies:
            _draw_curves(axes, [run for run in runs if run.policy == policy], column, _line_style(policy))
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.1 * (high - low))  # room for the names of the phases
        axes.set_title(title, fontsize=13, loc="left")
        axes.grid(visible=True, axis="y", alpha=0.35)
        axes.set_xlim(0, plan.duration_s)
    handles = [Line2D([], [], linewidth=2.2, **_line_style(policy)) for policy in policies]
    names = [POLICIES[policy].title for policy in policies]
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
    return {"color": POLICIES[policy].colour, "linestyle": POLICIES[policy].dashes}


def _shade(axes: Any, plan: DriftPlan) -> None:
    for phase, style in enumerate(plan.styles):
        began_s = phase * plan.phase_s
        axes.axvspan(began_s, began_s + plan.phase_s, color=_SHADES[phase % 2], zorder=0, linewidth=0)
        label = f"users prefer “{style.value}”"
        where = (began_s + plan.phase_s / 2, 0.985)
        axes.text(*where, label, transform=axes.get_xaxis_transform(), ha="center", va="top", color="#666666")


def _draw_curves(axes: Any, runs: Sequence[Run], column: str, style: dict[str, Any]) -> None:
    """Each run as a step function, and their mean on a common grid of times."""
    plan = runs[0].plan
    grid_s = np.linspace(0, plan.duration_s, round(plan.duration_s / plan.poll_s) + 1)
    rows = []
    for run in runs:
        cells = [(point.time_s, getattr(point, column)) for point in run.points]
        known = [(time_s, _number(cell)) for time_s, cell in cells if cell is not None]
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


def _number(cell: float | str) -> float:
    """The value of a cell; of a version its number, 0 for the base."""
    if not isinstance(cell, str):
        return cell
    return 0 if cell == BASE else int(cell.removeprefix("v"))
