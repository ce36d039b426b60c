"""Runs the windows of a part one after another, or takes them from the journal."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.harness.jobs import Job, calibrate_rate
from benchmarks.harness.models import vocab_size
from benchmarks.harness.results import medians, pooled_attainment
from benchmarks.harness.statistics import ratio_of
from benchmarks.studies.memory.journal import Journal, fingerprint_of
from benchmarks.studies.memory.windows import Cell, EnginePool, WatchedEngine, WindowResult
from benchmarks.studies.slo import with_rate
from core.config import AppArgs
from simulator.trace import Trace

TRACES = Path(__file__).parents[2] / "traces"

_WARM_UP_S = 3.0
"""Before each window: the engine is warm, the prefix cache is not."""

Note = Callable[[str], None]
Measure = Callable[[Cell], Awaitable[WindowResult]]
"""`EnginePool.measure`."""
Measured = list[tuple[Cell, WindowResult]]


class MemoryOptions(BaseModel):
    """What the command line can choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(10.0, gt=0)
    repeats: int = Field(6, ge=1)
    rate_per_s: float | None = None
    """None: calibrated (prefix), or as the trace says (the others)."""
    busy_share: float = Field(0.6, gt=0, lt=1)
    """What calibration aims at."""
    soak_minutes: float = Field(30.0, gt=0)
    pruning_report: Path | None = None
    """What `mace profile pruning` found, to be shown beside the gains."""


def load_trace(name: str, options: MemoryOptions) -> Trace:
    """The trace `memory-<name>.yaml`, as long as the options say, and at their rate if they have one."""
    trace = Trace.load(TRACES / f"memory-{name}.yaml").model_copy(update={"duration_s": options.seconds})
    return trace if options.rate_per_s is None else with_rate(trace, options.rate_per_s)


def job_of(trace: Trace, args: AppArgs, model_dir: Path) -> Job:
    """The window of this trace under these settings, on the model for long contexts."""
    return Job(
        model="long",
        model_dir=model_dir,
        trace=trace.model_copy(update={"args": args}),
        window_s=trace.duration_s or 10.0,
        warm_up_s=_WARM_UP_S,
    )


async def run_cells(cells: Sequence[Cell], measure: Measure, journal: Journal, note: Note) -> Measured:
    """All windows, in order.

    Raises:
        TrainingError: no fine-tune step succeeds.
        ConfigError: the journal cannot be written.
    """
    done: Measured = []
    for cell in cells:
        fingerprint = fingerprint_of(
            {"job": cell.job.model_dump(mode="json", exclude={"model_dir"}), "system_tokens": cell.system_tokens}
        )
        found = journal.find(cell.key, fingerprint)
        if found is None:
            result = await measure(cell)
            journal.add(cell.key, fingerprint, result.model_dump(mode="json"))
        else:
            result = WindowResult.model_validate(found)
        note(f"{cell.key}: {_line(result)}")
        done.append((cell, result))
    return done


async def calibrated_rate(pool: EnginePool, setting: str, job: Job, busy_share: float, journal: Journal) -> float:
    """Requests per second at which this engine, with nothing shared and no training, is busy for that share."""
    key = f"rate/{job.trace.name}"
    fingerprint = fingerprint_of([job.model_dump(mode="json", exclude={"model_dir"}), busy_share])
    found = journal.find(key, fingerprint)
    if found is None:
        live = await pool.get(setting, job)
        engine = WatchedEngine(live, [])
        probe_s = max(5.0, job.window_s / 2)
        found = await calibrate_rate(engine, job.trace, vocab_size(job.model_dir), probe_s, busy_share)
        journal.add(key, fingerprint, found)
    return float(found)


def row_of(results: Sequence[WindowResult]) -> dict[str, Any]:
    """Medians over repeats, and what is summed or pooled."""
    queries = sum(result.counts.prefix_queries for result in results)
    hits = sum(result.counts.prefix_hits for result in results)
    row: dict[str, Any] = dict(medians([result.metrics for result in results]))
    row["pooled_slo_attainment"] = pooled_attainment([result.metrics for result in results])
    row["num_requests"] = sum(result.metrics.num_requests for result in results)
    row["num_errors"] = sum(result.metrics.num_errors for result in results)
    row["hit_ratio"] = hits / queries if queries else None
    row["preemptions"] = sum(result.counts.preemptions for result in results)
    row["kv_use_max"] = max(
        (r.counts.kv_use_max for r in results if r.counts.kv_use_max is not None), default=None
    )
    row["kv_use_mean"] = _mean([r.counts.kv_use_mean for r in results if r.counts.kv_use_mean is not None])
    row["other_cpu_share"] = _mean([result.other_cpu_share for result in results])
    row["all_blocks_free"] = all(result.all_blocks_free for result in results)
    for total in ("pruned_blocks", "pruned_requests"):
        known = [result.status[total] for result in results if result.status.get(total) is not None]
        row[total] = sum(known) if known else None
    row["repeats"] = [result.model_dump(mode="json") for result in results]
    return row


def values_of(
    pairs: Sequence[tuple[WindowResult, WindowResult]], name: str
) -> list[tuple[float | None, float | None]]:
    """One metric of windows that were measured side by side."""
    return [(getattr(a.metrics, name), getattr(b.metrics, name)) for a, b in pairs]


def compare(pairs: Sequence[tuple[WindowResult, WindowResult]], names: Sequence[str]) -> dict[str, Any]:
    """Ratio of the first to the second, with its interval, for each of these metrics."""
    ratios = {name: ratio_of(values_of(pairs, name)) for name in names}
    return {name: None if ratio is None else ratio.model_dump() for name, ratio in ratios.items()}


def grouped(measured: Measured) -> Mapping[tuple[str, str], list[WindowResult]]:
    """Results by case and setting, in order of the repeats."""
    groups: dict[tuple[str, str], list[WindowResult]] = {}
    for cell, result in measured:
        groups.setdefault((cell.case, cell.setting), []).append(result)
    return groups


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _line(result: WindowResult) -> str:
    metrics, counts = result.metrics, result.counts

    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds:.0f} ms"

    hit = "-" if counts.hit_ratio is None else f"{counts.hit_ratio:.1%}"
    pruned = result.status.get("pruned_blocks")
    return (
        f"attainment {metrics.slo_attainment} of {metrics.num_requests}, TTFT p50 {ms(metrics.ttft_p50_s)} "
        f"p99 {ms(metrics.ttft_p99_s)}, TBT p50 {ms(metrics.tbt_p50_s)} p99 {ms(metrics.tbt_p99_s)}, "
        f"{metrics.pairs_per_s:.2f} pairs/s, hits {hit}, KV mean {counts.kv_use_mean or 0:.0%} "
        f"max {counts.kv_use_max or 0:.0%}, {counts.preemptions} preempted, {pruned} blocks pruned, "
        f"{metrics.num_errors} errors, other processes {result.other_cpu_share:.0%}"
    )
