"""From the runs to files and tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.studies.drift.curves import CSV_NAME, Run, write_csv
from benchmarks.studies.drift.plot import PNG_NAME, draw
from benchmarks.studies.drift.policies import TITLES, Policy
from benchmarks.studies.drift.record import RunRecord
from benchmarks.studies.drift.summary import summarize

SUMMARY_NAME = "summary.json"


def write_report(records: Sequence[RunRecord], out: Path) -> dict[str, Any]:
    """Write drift.csv, drift.png and summary.json; returns the summary."""
    runs = [Run(record) for record in records]
    summary = summarize(runs)
    write_csv(runs, out / CSV_NAME)
    draw(runs, summary["targets"], out / PNG_NAME)
    (out / SUMMARY_NAME).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
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
