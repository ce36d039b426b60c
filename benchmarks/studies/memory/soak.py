"""Half an hour of long contexts with the KV cache full and training on: nothing runs out, nothing leaks."""

import asyncio
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.harness.client import Clock, EnginePort, Load, RequestRecord
from benchmarks.harness.feeder import TaskRecord
from benchmarks.harness.jobs import TRACES, feeder_of
from benchmarks.harness.report import note
from benchmarks.harness.server import title_of
from benchmarks.harness.statistics import Trend, latency_summary, mean, trend_of
from benchmarks.harness.window import with_prompts
from benchmarks.studies.memory.parts import FULL, Journal, MemoryOptions, settings_of
from benchmarks.studies.memory.windows import Counts, EnginePool, WatchedEngine, status_between
from core.errors import MaceError
from simulator.trace import Trace

HIGH_USE = 0.95
"""Share of the KV blocks from which the cache counts as full."""
SYSTEM_TOKENS = 256
"""Shared prompts, so that sharing and pruning meet."""

_OVERSUBSCRIBED = 1.5
"""Tokens that are wanted at any time, of those that the cache holds."""
POLL_S = 1.0
_READ_EVERY = 5
"""Polls between two readings of the processes' memory."""
_NOTE_EVERY = 60
"""Polls between two lines of progress."""
_DRAIN_S = 120.0
_SERIES = 240
"""Readings that the report keeps for a picture."""


@dataclass(slots=True)
class SoakRecord:
    """Everything seen during a soak."""

    requests: list[RequestRecord] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)
    out_of_memory: int = 0
    """Slices that found no memory."""
    ledger_errors: list[str] = field(default_factory=list)
    readings: list[dict[str, float]] = field(default_factory=list)
    """Time, use of the KV cache, and memory of each process."""
    fullness: list[bool] = field(default_factory=list)
    """For each poll, True if at least `HIGH_USE` of the KV blocks were in use."""
    elapsed_s: float = 0.0
    """How long the load lasted."""
    counts: Counts = field(default_factory=Counts)
    """Counts of the time under load."""


async def measure_soak(pool: EnginePool, options: MemoryOptions, journal: Journal) -> dict[str, Any]:
    """Run it; a report of built-in types. A soak that was cut off begins anew, one that ended is in the journal."""
    job = FULL.job(Trace.load(TRACES / "memory-soak.yaml"), pool.model_dir)

    async def soak() -> dict[str, Any]:
        watched = await pool.get("soak", job.trace.args)
        before = await watched.engine.memory_status()
        record, num_clients = await load_engine(watched, job.trace, pool.vocabulary, 60 * options.soak_minutes)
        status = status_between(before, await watched.engine.memory_status())
        all_free = bool(await watched.engine.client.reset_prefix_cache())
        report = summarize_soak(record, status, all_blocks_free=all_free)
        return {**report, "trace": job.trace.model_dump(mode="json"), "requests_at_once": num_clients}

    found: dict[str, Any] = await journal.once("soak", [settings_of(job), options.soak_minutes], soak)
    return found


async def load_engine(
    watched: WatchedEngine, trace: Trace, vocabulary: int, seconds: float
) -> tuple[SoakRecord, int]:
    """Keep the cache full for that long, then wait for what runs; MaceError if that takes two minutes.

    Returns everything seen, and how many requests were under way at once.
    """
    some = itertools.islice(trace.requests(), 200)
    tokens_each = statistics.fmean(request.num_prompt_tokens + request.num_output_tokens for request in some)
    num_clients = 1 + int(_OVERSUBSCRIBED * (watched.engine.kv_cache_tokens or 0) / tokens_each)
    watched.share_prompts(SYSTEM_TOKENS, vocabulary, trace.seed)
    clock, feeder = Clock(), feeder_of(watched, trace, vocabulary)
    load = Load(EnginePort(watched), clock)
    record = SoakRecord(load.records, feeder.finished)
    feeder.start()
    requests = with_prompts(trace.requests(), vocabulary, trace.seed, "soak")
    sending = asyncio.create_task(load.closed_loop(requests, num_clients))
    try:
        await _watch(watched, record, clock, seconds)
        record.elapsed_s, record.counts = clock(), watched.stats.read()
        late = await load.drain(_DRAIN_S)
    finally:
        sending.cancel()
        await load.drain(0.0)
        await feeder.stop()
    if late:
        raise MaceError(f"{late} requests did not end within {_DRAIN_S:.0f} s")
    await asyncio.sleep(POLL_S)  # aborted steps reach the worker
    return record, num_clients


async def _watch(watched: WatchedEngine, record: SoakRecord, clock: Clock, seconds: float) -> None:
    last_seen, _ = await watched.iterations(0)
    processes = dict(engine_processes())
    for number in itertools.count():
        await asyncio.sleep(POLL_S)
        last_seen, samples = await watched.iterations(last_seen)
        record.out_of_memory += sum(sample.report.out_of_memory for sample in samples)
        record.fullness.append(watched.stats.kv_use >= HIGH_USE)
        if number % _READ_EVERY == 0:
            sizes = {f"{name}_rss_bytes": float(one.memory_info().rss) for name, one in processes.items()}
            status = await watched.engine.memory_status()
            counts = {key: float(value) for key, value in status.items() if isinstance(value, int | float)}
            record.readings.append({"time_s": clock(), "kv_use": watched.stats.kv_use, **sizes, **counts})
            if status.get("ledger_error"):
                record.ledger_errors.append(str(status["ledger_error"]))
        if number % _NOTE_EVERY == 0:
            last = {name: f"{value:.4g}" for name, value in record.readings[-1].items()}
            note(
                f"soak: {len(record.requests)} requests, {len(record.tasks)} steps, {watched.stats.read()}, {last}"
            )
        if clock() >= seconds:
            return


def summarize_soak(record: SoakRecord, status: dict[str, Any], *, all_blocks_free: bool) -> dict[str, Any]:
    """Totals, trends of the memory of each process, and checks."""
    readings = record.readings

    def trend(name: str) -> Trend | None:
        return trend_of([reading["time_s"] for reading in readings], [reading[name] for reading in readings])

    trends = {name: trend(name) for name in (readings[0] if readings else {}) if name.endswith("_rss_bytes")}
    heap = trend("heap_used_bytes") if all("heap_used_bytes" in reading for reading in readings) else None
    errors = [f"{request.request_id}: {request.error}" for request in record.requests if request.error]
    failed_steps = [task.error for task in record.tasks if task.error]
    use = record.counts.kv_use_mean or 0.0
    books = not record.ledger_errors if "ledger_error" in status else None
    facts = (
        ("requests without an error", len(errors), not errors),
        ("steps without an error", len(failed_steps), not failed_steps),
        ("no slice ran out of memory", record.out_of_memory, not record.out_of_memory),
        (f"mean share of KV blocks in use at least {HIGH_USE:.0%}", use, use >= HIGH_USE),
        ("the ledger's books balance (check_integrity)", record.ledger_errors[:3], books),
        ("all KV blocks free at the end", all_blocks_free, all_blocks_free),
    )
    sizes = {f"{name.removesuffix('_rss_bytes')}: resident memory is flat": one for name, one in trends.items()}
    sizes["worker: heap memory in use is flat (no leak; resident memory also counts the heap's holes)"] = heap
    checks = [
        *({"check": title, "value": value, "passed": passed} for title, value, passed in facts),
        *(
            {
                "check": title,
                "value": one and one.bytes_per_hour,
                "passed": one and one.is_flat,
                "interval": one and [one.low, one.high],
            }
            for title, one in sizes.items()
        ),
    ]
    return {
        "elapsed_s": record.elapsed_s,
        "requests": sum(request.succeeded for request in record.requests),
        "output_tokens": sum(request.num_tokens for request in record.requests),
        "errors": errors[:10],
        "steps": len(record.tasks) - len(failed_steps),
        "failed_steps": failed_steps[:10],
        "pairs_per_s": sum(task.num_pairs for task in record.tasks if not task.error) / record.elapsed_s,
        "counts": record.counts.model_dump(),
        "share_of_time_full": mean(record.fullness) or 0.0,
        "status": status,
        "ttft": latency_summary([request.ttft_s for request in record.requests if request.ttft_s is not None]),
        "tbt": latency_summary([gap_s for request in record.requests for gap_s in request.gaps_s]),
        "rss": {name: one and one.model_dump() for name, one in trends.items()},
        "heap_in_use": heap and heap.model_dump(),
        "series": readings[:: max(1, len(readings) // _SERIES)],
        "checks": checks,
    }


def engine_processes() -> Iterator[tuple[str, psutil.Process]]:
    """This process and the engine's, by a name for reports."""
    me = psutil.Process()
    yield "client", me
    for child in me.children(recursive=True):
        title = title_of(child)
        for mark, name in (("VLLM::EngineCore", "engine_core"), ("VLLM::Worker", "worker")):
            if mark in title:
                yield name, child
