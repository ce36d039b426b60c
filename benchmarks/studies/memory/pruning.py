"""What dropping KV blocks gains when memory is short, at each fraction; and what it costs in accuracy."""

from pathlib import Path
from typing import Any

from benchmarks.harness.models import vocab_size
from benchmarks.studies.memory.capacity import Capacity, measure_capacity
from benchmarks.studies.memory.journal import Journal, fingerprint_of
from benchmarks.studies.memory.running import (
    Measured,
    MemoryOptions,
    Note,
    compare,
    grouped,
    job_of,
    load_trace,
    row_of,
    run_cells,
)
from benchmarks.studies.memory.windows import Cell, EnginePool, in_turns
from core.config import AppArgs, KvPruningConfig
from engine.pruning.gate import PruningReport
from simulator.trace import Trace

FRACTIONS = (0.0, 0.1, 0.25, 0.5)
CONTEXTS = (512, 1024, 2048)
"""Lengths for which the largest batch is searched."""

COMPARED = ("ttft_p50_s", "ttft_p99_s", "tbt_p50_s", "tbt_p99_s", "pairs_per_s")


async def measure_pruning(
    pool: EnginePool, model_dir: Path, options: MemoryOptions, journal: Journal, note: Note
) -> dict[str, Any]:
    """All windows of this part and the searches for capacity, as a report of built-in types."""
    trace = load_trace("pressure", options)
    cells = plan_cells(trace, model_dir, options.repeats)
    measured = await run_cells(cells, pool.measure, journal, note)
    capacities = [
        await _capacity(pool, cells[number], fraction, context, journal, note)
        for number, fraction in enumerate(FRACTIONS)
        for context in CONTEXTS
    ]
    accuracy = None if options.pruning_report is None else PruningReport.load(options.pruning_report)
    return {"trace": trace.model_dump(mode="json"), **summarize_pruning(measured, capacities, accuracy)}


def plan_cells(trace: Trace, model_dir: Path, repeats: int) -> list[Cell]:
    """Windows in their order; the first ones are one for each of `FRACTIONS`, in that order."""
    cells: list[Cell] = []
    for repeat in range(repeats):
        seeded = trace.model_copy(update={"seed": trace.seed + repeat})
        fractions = in_turns(FRACTIONS, repeat)
        cells.extend(
            Cell(
                part="pruning",
                case="pressure",
                setting=_engine(fraction),
                repeat=repeat,
                job=job_of(seeded, with_pruning(trace.args, fraction), model_dir),
            )
            for fraction in fractions
        )
    return cells


def with_pruning(args: AppArgs, fraction: float) -> AppArgs:
    """The settings with that share of blocks to drop under memory pressure; 0: pruning is off.

    The accuracy gate is not asked: the weights are random.
    """
    if fraction == 0:
        config = args.kv_pruning.model_copy(update={"start": "off"})
    else:
        update = {"start": "memory_pressure", "max_fraction": fraction, "require_gate": False}
        config = KvPruningConfig.model_validate({**args.kv_pruning.model_dump(), **update})
    return args.model_copy(update={"kv_pruning": config})


def summarize_pruning(
    measured: Measured, capacities: list[tuple[float, Capacity]], accuracy: PruningReport | None
) -> dict[str, Any]:
    """A row for each fraction, and ratios to no pruning with intervals."""
    groups = grouped(measured)
    plain = groups.get(("pressure", _engine(0.0)), [])
    rows, ratios = [], []
    for fraction in FRACTIONS:
        results = groups.get(("pressure", _engine(fraction)), [])
        if not results:
            continue
        fitting = [capacity for at, capacity in capacities if at == fraction]
        rows.append(
            {
                "fraction": fraction,
                **row_of(results),
                "capacity": [capacity.model_dump() for capacity in fitting],
                **_accuracy_row(accuracy, fraction),
            }
        )
        if fraction:
            ratios.append({"fraction": fraction, **compare(list(zip(results, plain, strict=False)), COMPARED)})
    return {"rows": rows, "over_no_pruning": ratios}


def _accuracy_row(report: PruningReport | None, fraction: float) -> dict[str, Any]:
    """From `mace profile pruning` on another model: the weights here are random, so there is nothing to get wrong."""
    if report is None:
        return {}
    if fraction == 0:
        baseline = {kind: {"accuracy": task.accuracy} for kind, task in report.baseline.items()}
        return {"accuracy_model": report.origin.model, "logprob_drop": None, "tasks": baseline}
    found = next((row for row in report.fractions if abs(row.fraction - fraction) < 1e-9), None)
    if found is None:
        return {}
    return {
        "accuracy_model": report.origin.model,
        "logprob_drop": found.logprob_drop.model_dump(),
        "tasks": {kind: task.model_dump() for kind, task in found.tasks.items()},
    }


async def _capacity(
    pool: EnginePool, cell: Cell, fraction: float, context: int, journal: Journal, note: Note
) -> tuple[float, Capacity]:
    key = f"capacity/{fraction:g}/{context}"
    fingerprint = fingerprint_of(cell.job.trace.args.model_dump(mode="json"))
    found = journal.find(key, fingerprint)
    if found is None:
        live = await pool.get(cell.setting, cell.job)
        capacity = await measure_capacity(live, context, fraction, vocab_size(cell.job.model_dir))
        journal.add(key, fingerprint, capacity.model_dump())
    else:
        capacity = Capacity.model_validate(found)
    note(f"{key}: batch {capacity.batch} ({capacity.fit_without_pruning} without pruning), tried {capacity.tried}")
    return fraction, capacity


def _engine(fraction: float) -> str:
    return f"pruning {fraction:.0%}"
