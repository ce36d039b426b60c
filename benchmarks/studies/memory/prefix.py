"""What sharing prefixes gains at each overlap, and what it costs where there is little to share."""

from pathlib import Path
from typing import Any

from benchmarks.harness.statistics import ratio_of
from benchmarks.studies.memory.journal import Journal
from benchmarks.studies.memory.running import (
    Measured,
    MemoryOptions,
    Note,
    calibrated_rate,
    compare,
    grouped,
    job_of,
    load_trace,
    row_of,
    run_cells,
    values_of,
)
from benchmarks.studies.memory.windows import Cell, EnginePool, WindowResult, with_engine_kwargs
from benchmarks.studies.slo import with_rate
from simulator.trace import Trace, Uniform

OVERLAPS = (0.0, 0.05, 0.2, 0.36, 0.6)
"""Shares of the prompt tokens that belong to a system prompt; 0.05 and 0.36 are the ends of what the paper found."""
LOW_OVERLAP = 0.05
"""Here it must cost nothing measurable; measured twice as often."""
SETTINGS = {"on": True, "off": False}

COMPARED = ("ttft_p50_s", "ttft_p99_s", "tbt_p50_s", "tbt_p99_s", "pairs_per_s", "forward_share", "overhead_share")
_MORE_IS_BETTER = {"pairs_per_s"}
CHECK_CONFIDENCE = 0.99
"""Of the intervals that the checks use: seven numbers are checked at once, and one in twenty would fail by chance."""


async def measure_prefix(
    pool: EnginePool, model_dir: Path, options: MemoryOptions, journal: Journal, note: Note
) -> dict[str, Any]:
    """All windows of this part, as a report of built-in types."""
    trace = load_trace("prefix", options)
    if options.rate_per_s is None:
        job = job_of(trace, with_engine_kwargs(trace.args, enable_prefix_caching=False), model_dir)
        trace = with_rate(trace, await calibrated_rate(pool, _engine("off"), job, options.busy_share, journal))
    note(f"prefix: {trace.arrivals.rate_per_s} requests/s")
    measured = await run_cells(plan_cells(trace, model_dir, options.repeats), pool.measure, journal, note)
    return {"trace": trace.model_dump(mode="json"), **summarize_prefix(measured)}


def plan_cells(trace: Trace, model_dir: Path, repeats: int) -> list[Cell]:
    """Windows in their order: both settings side by side, and the first of a pair changes from pair to pair."""
    cells: list[Cell] = []
    for repeat in range(2 * repeats):
        for position, overlap in enumerate(OVERLAPS):
            if repeat >= repeats and overlap != LOW_OVERLAP:
                continue
            # Other arrivals and prompts in each repeat; the same ones for both settings.
            seeded = trace.model_copy(update={"seed": trace.seed + repeat})
            order = ("on", "off") if (repeat + position) % 2 == 0 else ("off", "on")
            cells.extend(_cell(seeded, model_dir, overlap, setting, repeat) for setting in order)
    return cells


def summarize_prefix(measured: Measured) -> dict[str, Any]:
    """Rows of medians, ratios of on over off with intervals, and whether little overlap costs anything."""
    groups = grouped(measured)
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for overlap in OVERLAPS:
        on, off = (groups.get((_case(overlap), _engine(setting)), []) for setting in SETTINGS)
        if not on or not off:
            continue
        rows.extend(
            {"overlap": overlap, "sharing": setting, **row_of(results)}
            for setting, results in (("on", on), ("off", off))
        )
        pairs = list(zip(on, off, strict=False))
        ratios.append({"overlap": overlap, **compare(pairs, COMPARED)})
        if overlap == LOW_OVERLAP:
            checks = _checks(pairs)
    return {"rows": rows, "on_over_off": ratios, "checks": checks}


def _checks(pairs: list[tuple[WindowResult, WindowResult]]) -> list[dict[str, Any]]:
    """No interval may lie wholly on the worse side of 1."""
    checks = []
    for name in COMPARED:
        ratio = ratio_of(values_of(pairs, name), CHECK_CONFIDENCE)
        if ratio is None or ratio.low is None or ratio.high is None:
            continue
        is_worse = ratio.high < 1 if name in _MORE_IS_BETTER else ratio.low > 1
        checks.append(
            {
                "check": f"{name}, sharing on / off at {LOW_OVERLAP:.0%} overlap, is not worse than 1",
                "value": ratio.ratio,
                "interval": [ratio.low, ratio.high],
                "confidence": CHECK_CONFIDENCE,
                "passed": not is_worse,
            }
        )
    return checks


def _cell(trace: Trace, model_dir: Path, overlap: float, setting: str, repeat: int) -> Cell:
    args = with_engine_kwargs(trace.args, enable_prefix_caching=SETTINGS[setting])
    return Cell(
        part="prefix",
        case=_case(overlap),
        setting=_engine(setting),
        repeat=repeat,
        job=job_of(trace, args, model_dir),
        system_tokens=system_tokens(trace, overlap),
    )


def system_tokens(trace: Trace, overlap: float) -> int:
    """Length of a system prompt that makes up this share of all prompt tokens."""
    lengths = trace.prompt_tokens
    assert isinstance(lengths, Uniform)
    return round(overlap * (lengths.low + lengths.high) / 2)


def _case(overlap: float) -> str:
    return f"overlap {overlap:.0%}"


def _engine(setting: str) -> str:
    return f"sharing {setting}"
