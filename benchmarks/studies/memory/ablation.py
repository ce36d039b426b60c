"""Each mechanism taken away under a trace that is short of memory, as in the paper's Fig. 12."""

from pathlib import Path
from typing import Any

from benchmarks.harness.statistics import center_of
from benchmarks.studies.memory.journal import Journal
from benchmarks.studies.memory.pruning import with_pruning
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
from benchmarks.studies.memory.windows import Cell, EnginePool, WindowResult, in_turns, with_engine_kwargs
from benchmarks.studies.slo import with_rate
from core.config import AppArgs
from simulator.trace import Trace

FULL = "MACE"
SETTINGS: dict[str, tuple[bool, float]] = {
    FULL: (True, 0.25),
    "/Prefix": (False, 0.25),
    "/Prune": (True, 0.0),
    "/Prefix/Prune": (False, 0.0),
}
"""Whether prefixes are shared, and the share of blocks that may be dropped."""

LOADS = (1.0, 1.5)
"""Factors of the trace's rate."""
SYSTEM_TOKENS = 432
"""36 % of a mean prompt of the trace, the upper end of what the paper found."""

COMPARED = ("slo_attainment", "ttft_p50_s", "ttft_p99_s", "tbt_p50_s", "tbt_p99_s", "pairs_per_s")


async def measure_ablation(
    pool: EnginePool, model_dir: Path, options: MemoryOptions, journal: Journal, note: Note
) -> dict[str, Any]:
    """All windows of this part, as a report of built-in types."""
    trace = load_trace("pressure", options)
    measured = await run_cells(plan_cells(trace, model_dir, options.repeats), pool.measure, journal, note)
    return {"trace": trace.model_dump(mode="json"), **summarize_ablation(measured)}


def plan_cells(trace: Trace, model_dir: Path, repeats: int) -> list[Cell]:
    """Windows in their order; the order of the settings turns with each repeat."""
    cells: list[Cell] = []
    for repeat in range(repeats):
        for load in LOADS:
            loaded = with_rate(trace, load * trace.arrivals.rate_per_s)
            seeded = loaded.model_copy(update={"seed": trace.seed + repeat})
            settings = in_turns(list(SETTINGS), repeat)
            cells.extend(_cell(seeded, model_dir, load, setting, repeat) for setting in settings)
    return cells


def summarize_ablation(measured: Measured) -> dict[str, Any]:
    """A row for each load and setting; `over_full` are ratios to all mechanisms, `attainment_gain` is in points."""
    groups = grouped(measured)
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for load in LOADS:
        full = groups.get((_case(load), FULL), [])
        for setting in SETTINGS:
            results = groups.get((_case(load), setting), [])
            if not results:
                continue
            name = {"load": load, "setting": setting}
            rows.append({**name, **row_of(results)})
            if setting != FULL:
                pairs = list(zip(results, full, strict=False))
                ratios.append({**name, "attainment_gain": attainment_gain(pairs), **compare(pairs, COMPARED)})
    return {"rows": rows, "over_full": ratios}


def attainment_gain(pairs: list[tuple[WindowResult, WindowResult]]) -> dict[str, Any] | None:
    """What the mechanism adds to SLO attainment: with all minus without it, with a 95 % interval."""
    gains = [
        full.metrics.slo_attainment - without.metrics.slo_attainment
        for without, full in pairs
        if full.metrics.slo_attainment is not None and without.metrics.slo_attainment is not None
    ]
    if not gains:
        return None
    middle, low, high = center_of(gains)
    return {"middle": middle, "low": low, "high": high, "num_pairs": len(gains)}


def _cell(trace: Trace, model_dir: Path, load: float, setting: str, repeat: int) -> Cell:
    return Cell(
        part="ablation",
        case=_case(load),
        setting=setting,
        repeat=repeat,
        job=job_of(trace, ablated(trace.args, setting), model_dir),
        system_tokens=SYSTEM_TOKENS,
    )


def ablated(args: AppArgs, setting: str) -> AppArgs:
    """The settings with what this ablation leaves."""
    shares, fraction = SETTINGS[setting]
    return with_engine_kwargs(with_pruning(args, fraction), enable_prefix_caching=shares)


def _case(load: float) -> str:
    return f"load {load:g}"
