"""`mace bench`: the measurements behind the numbers in docs/."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness.models import ModelName, model_directories
from benchmarks.studies import feedback, publish_cost, weights
from benchmarks.studies.memory import command as memory
from core.errors import MaceError

bench = typer.Typer(no_args_is_help=True, help=__doc__)
bench.command("weights")(weights.main)
bench.command("feedback")(feedback.main)
bench.command("memory")(memory.main)
bench.command("publish")(publish_cost.main)

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr")]
_StateDir = Annotated[Path, typer.Option(help="Where the built-in model is or will be")]

_COLUMNS = (
    ("attainment", "pooled_slo_attainment", "{:.3f}"),
    ("TTFT p50, s", "ttft_p50_s", "{:.3f}"),
    ("TTFT p99, s", "ttft_p99_s", "{:.3f}"),
    ("TBT p50, s", "tbt_p50_s", "{:.3f}"),
    ("TBT p99, s", "tbt_p99_s", "{:.3f}"),
    ("pairs/s", "pairs_per_s", "{:.2f}"),
    ("of ideal", "pairs_of_ideal", "{:.2f}"),
    ("forward", "forward_share", "{:.0%}"),
    ("slices", "slices_share", "{:.0%}"),
)


@bench.command("slo")
def slo(
    as_json: _AsJson = False,
    model: Annotated[Literal["tiny", "half-b", "both"], typer.Option(help="Which model")] = "both",
    seconds: Annotated[float, typer.Option(min=2, help="Length of each measuring window")] = 40.0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each policy, interleaved")] = 3,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests/s; none: calibrated")] = None,
    busy: Annotated[float, typer.Option(min=0.01, max=0.95, help="Busy share that calibration aims at")] = 0.4,
    ttft: Annotated[float | None, typer.Option(min=0.001, help="TTFT target in seconds")] = None,
    tbt: Annotated[float | None, typer.Option(min=0.001, help="TBT target in seconds")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Worker threads; 0: the engine's rule")] = 0,
    profile: Annotated[Path | None, typer.Option(help="Profile to start from; none: measured first")] = None,
    state_dir: _StateDir = Path("state"),
) -> None:
    """SLO attainment and training throughput of every policy on the CPU engine."""
    from benchmarks.harness.jobs import run_job
    from benchmarks.studies.slo import SloOptions, measure_model

    options = SloOptions(
        seconds=seconds,
        repeats=repeats,
        rate_per_s=rate,
        ttft_s=ttft,
        tbt_s=tbt,
        num_threads=threads,
        profile=profile,
        busy_share=busy,
    )
    names: list[ModelName] = ["tiny", "half-b"] if model == "both" else [model]
    try:
        with model_directories(names, state_dir, show_progress=not as_json) as directories:
            reports = [measure_model(name, directories[name], options, run_job, _note) for name in names]
    except MaceError as error:
        typer.echo(f"mace bench slo: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(reports, indent=2))
        return
    for report in reports:
        _show_slo(report)


@bench.command("scheduler")
def scheduler(
    as_json: _AsJson = False,
    running: Annotated[int, typer.Option(min=1, help="Running requests")] = 256,
    waiting: Annotated[int, typer.Option(min=1, help="Waiting requests")] = 1000,
    tasks: Annotated[int, typer.Option(min=1, help="Fine-tune tasks")] = 500,
    iterations: Annotated[int, typer.Option(min=100, help="Iterations timed")] = 5000,
) -> None:
    """What the decisions of one engine iteration cost, without a device."""
    from benchmarks.studies.scheduler_cost import CostOptions, measure_cost

    result = measure_cost(
        CostOptions(num_running=running, num_waiting=waiting, num_tasks=tasks, iterations=iterations)
    )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    table = Table("part", "median, ms", "p99, ms", "max, ms")
    for name, part in {**result["parts"], "total": result["total"]}.items():
        table.add_row(name, *(f"{part[key]:.4f}" for key in ("median_ms", "p99_ms", "max_ms")))
    console = Console()
    console.print(table)
    console.print("targets met" if result["passed"] else "targets missed", result["targets"])


def _note(line: str) -> None:
    typer.echo(line, err=True)


def _show_slo(report: dict[str, Any]) -> None:
    table = Table("policy", *(title for title, _, _ in _COLUMNS), title=report["model"])
    for row in report["rows"]:
        values = [(row[key], pattern) for _, key, pattern in _COLUMNS]
        table.add_row(row["policy"], *("-" if v is None else pattern.format(v) for v, pattern in values))
    console = Console()
    console.print(table)
    for check in report["checks"]:
        bound = f"at least {check['at_least']}" if "at_least" in check else f"at most {check['at_most']}"
        verdict = {True: "met", False: "missed", None: "not applicable"}[check["passed"]]
        console.print(f"{verdict}: {check['check']}: {check['value']} ({bound})")
