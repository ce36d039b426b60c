"""`mace bench memory`: options, and which parts run."""

import asyncio
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.jobs import VERSIONED
from benchmarks.harness.models import TITLES, model_directories
from benchmarks.harness.report import AsJson, Out, StateDir, show
from benchmarks.studies.memory.parts import (
    Journal,
    MemoryOptions,
    measure_ablation,
    measure_prefix,
    measure_pruning,
)
from benchmarks.studies.memory.report import draw, tables
from benchmarks.studies.memory.soak import measure_soak
from benchmarks.studies.memory.windows import EnginePool
from engine.pruning.gate import PruningReport
from profiler.device import installed_versions


class Part(StrEnum):
    """A part of the benchmark."""

    PREFIX = "prefix"
    PRUNING = "pruning"
    ABLATION = "ablation"
    SOAK = "soak"


_MEASURES = dict(zip(Part, (measure_prefix, measure_pruning, measure_ablation, measure_soak), strict=True))


def main(
    as_json: AsJson = False,
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
    state_dir: StateDir = Path("state"),
    out: Out = None,
) -> None:
    """Measure gains and costs of prefix sharing and KV pruning, and soak the memory."""
    options = MemoryOptions(
        seconds=seconds,
        repeats=repeats,
        rate_per_s=rate,
        busy_share=busy,
        soak_minutes=minutes,
        pruning_report=pruning_report,
    )
    if pruning_report is not None:
        PruningReport.load(pruning_report)  # a bad one is refused before an hour of windows, not after
    parts = part or [one for one in Part if one is not Part.SOAK]
    with model_directories(["long"], state_dir, show_progress=not as_json) as directories:
        report = asyncio.run(_measure(parts, directories["long"], options, Journal(resume)))
    if plot is not None:
        draw(report, plot)
    show(report, tables(report), as_json, out)


async def _measure(parts: list[Part], model_dir: Path, options: MemoryOptions, journal: Journal) -> dict[str, Any]:
    report: dict[str, Any] = {
        "model": TITLES["long"],
        "settings": {
            "options": options.model_dump(mode="json"),
            "cores": len(os.sched_getaffinity(0)),
            "versions": installed_versions(VERSIONED),
        },
    }
    for part in parts:
        pool = EnginePool(model_dir)  # the engines of one part are gone before the next one starts
        try:
            report[part.value] = await _MEASURES[part](pool, options, journal)
        finally:
            pool.shutdown()
    return report
