"""What it costs that oneDNN keeps fewer compiled matrix products, on CPU.

    python -m benchmarks.studies.kernel_cache --json

One engine for each capacity, windows in turns: the trace `memory-pressure` with everything on, as in the ablations of
`mace bench memory`. oneDNN reads its capacity when a process begins, so each engine is started with its own.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.models import model_directories
from benchmarks.studies.memory.ablation import COMPARED, FULL, SYSTEM_TOKENS, ablated
from benchmarks.studies.memory.journal import Journal
from benchmarks.studies.memory.running import (
    Measured,
    MemoryOptions,
    compare,
    grouped,
    job_of,
    load_trace,
    row_of,
    run_cells,
)
from benchmarks.studies.memory.windows import Cell, EnginePool, WindowResult, in_turns

_VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_HEAP = ("heap_used_bytes", "heap_free_bytes")


def main(
    capacity: Annotated[
        list[int] | None, typer.Option(help="Repeat for several; all are compared to the last")
    ] = None,
    seconds: Annotated[float, typer.Option(min=2, help="Length of each measuring window")] = 10.0,
    repeats: Annotated[int, typer.Option(min=1, help="Windows of each capacity, interleaved")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="The output is JSON either way")] = False,  # noqa: ARG001
) -> None:
    """Ratios over the last capacity (oneDNN's own default), and the worker's heap at the end of the last window."""
    options = MemoryOptions(seconds=seconds, repeats=repeats)
    with model_directories(["long"], Path(), show_progress=False) as directories:
        report = asyncio.run(_measure(capacity or [32, 128, 1024], directories["long"], options))
    typer.echo(json.dumps(report, indent=2))


async def _measure(capacities: list[int], model_dir: Path, options: MemoryOptions) -> dict[str, Any]:
    pool = EnginePool(model_dir)
    cells = plan_cells(capacities, model_dir, options)
    try:
        for cell in cells[: len(capacities)]:
            os.environ[_VARIABLE] = cell.setting
            await pool.get(cell.setting, cell.job)
        measured = await run_cells(cells, pool.measure, Journal(None), lambda line: typer.echo(line, err=True))
    finally:
        pool.shutdown()
    return {"seconds": options.seconds, "repeats": options.repeats, "rows": summarize(measured, capacities)}


def plan_cells(capacities: list[int], model_dir: Path, options: MemoryOptions) -> list[Cell]:
    """Windows in their order, which turns with each repeat."""
    trace = load_trace("pressure", options)
    cells: list[Cell] = []
    for repeat in range(options.repeats):
        seeded = trace.model_copy(update={"seed": trace.seed + repeat})
        job = job_of(seeded, ablated(seeded.args, FULL), model_dir)
        cells.extend(
            Cell("kernels", "pressure", str(c), repeat, job, SYSTEM_TOKENS) for c in in_turns(capacities, repeat)
        )
    return cells


def summarize(measured: Measured, capacities: list[int]) -> list[dict[str, Any]]:
    """A row for each capacity, with ratios to the last one."""
    by_capacity = {setting: results for (_, setting), results in grouped(measured).items()}
    default = by_capacity[str(capacities[-1])]
    return [
        {
            "capacity": capacity,
            "heap_mib": {name: round(by_capacity[str(capacity)][-1].status[name] / 2**20) for name in _HEAP},
            **_numbers(by_capacity[str(capacity)]),
            "over_last": compare(list(zip(by_capacity[str(capacity)], default, strict=True)), COMPARED),
        }
        for capacity in capacities
    ]


def _numbers(results: list[WindowResult]) -> dict[str, Any]:
    row = row_of(results)
    return {name: row[name] for name in ("pooled_slo_attainment", "ttft_p50_s", "tbt_p99_s", "pairs_per_s")}


if __name__ == "__main__":
    typer.run(main)
