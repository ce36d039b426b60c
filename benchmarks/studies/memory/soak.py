"""Half an hour of long contexts with the KV cache full and training on: nothing runs out, nothing leaks."""

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness.feeder import FineTuneFeeder
from benchmarks.harness.jobs import Job
from benchmarks.harness.models import vocab_size
from benchmarks.harness.statistics import Trend, trend_of
from benchmarks.studies.memory.ablation import FULL, ablated
from benchmarks.studies.memory.counts import Counts
from benchmarks.studies.memory.journal import Journal, fingerprint_of
from benchmarks.studies.memory.running import TRACES, MemoryOptions, Note, job_of
from benchmarks.studies.memory.windows import (
    EnginePool,
    LiveEngine,
    WatchedEngine,
    status_between,
    system_prompts,
)
from core.errors import MaceError
from simulator.statistics import Histogram
from simulator.trace import Trace, TraceRequest

HIGH_USE = 0.95
"""Of the KV blocks; the issue's number."""
SYSTEM_TOKENS = 256
"""Shared prompts, so that sharing and pruning meet."""

_OVERSUBSCRIBED = 1.5
"""Tokens that are wanted at any time, of those that the cache holds."""
_POLL_S = 1.0
_READ_EVERY = 5
"""Polls between two readings of the processes' memory."""
_NOTE_EVERY_S = 60.0
_DRAIN_S = 120.0
_SERIES = 240
"""Readings that the report keeps for a picture."""


@dataclass(slots=True)
class _Seen:
    """What happened so far."""

    done: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    steps: int = 0
    pairs: int = 0
    failed_steps: list[str] = field(default_factory=list)
    out_of_memory: int = 0
    ledger_errors: list[str] = field(default_factory=list)
    ttft: Histogram = field(default_factory=Histogram)
    tbt: Histogram = field(default_factory=Histogram)
    readings: list[dict[str, float]] = field(default_factory=list)
    num_full: int = 0
    num_polls: int = 0


async def measure_soak(
    pool: EnginePool, model_dir: Path, options: MemoryOptions, journal: Journal, note: Note
) -> dict[str, Any]:
    """Run it; a report of built-in types. A soak that was cut off begins anew, one that ended is in the journal."""
    trace = Trace.load(TRACES / "memory-soak.yaml")
    job = job_of(trace, ablated(trace.args, FULL), model_dir)
    fingerprint = fingerprint_of([job.model_dump(mode="json", exclude={"model_dir"}), options.soak_minutes])
    found: dict[str, Any] | None = journal.find("soak", fingerprint)
    if found is None:
        found = await _run_soak(await pool.get("soak", job), job, 60 * options.soak_minutes, note)
        journal.add("soak", fingerprint, found)
    return found


async def _run_soak(live: LiveEngine, job: Job, seconds: float, note: Note) -> dict[str, Any]:
    soak = _Soak(live, job, note)
    before = await live.engine.memory_status()
    elapsed_s = await soak.run(seconds)
    status = status_between(before, await live.engine.memory_status())
    all_free = bool(await live.engine.client.reset_prefix_cache())
    return summarize_soak(soak.seen, elapsed_s, soak.counts.model_dump(), status, all_blocks_free=all_free) | {
        "trace": job.trace.model_dump(mode="json"),
        "requests_at_once": soak.num_clients,
    }


def summarize_soak(
    seen: _Seen, elapsed_s: float, counts: dict[str, Any], status: dict[str, Any], *, all_blocks_free: bool
) -> dict[str, Any]:
    """Totals, trends of the memory of each process, and checks."""
    times_s = [reading["time_s"] for reading in seen.readings]
    names = [name for name in (seen.readings[0] if seen.readings else {}) if name.endswith("_rss_bytes")]
    trends = {name: trend_of(times_s, [reading[name] for reading in seen.readings]) for name in names}
    heap = [reading["heap_used_bytes"] for reading in seen.readings if "heap_used_bytes" in reading]
    heap_trend = trend_of(times_s, heap) if len(heap) == len(times_s) else None
    full_share = seen.num_full / seen.num_polls if seen.num_polls else 0.0
    every = max(1, len(seen.readings) // _SERIES)
    checks = [
        {"check": "requests without an error", "value": len(seen.errors), "passed": not seen.errors},
        {"check": "steps without an error", "value": len(seen.failed_steps), "passed": not seen.failed_steps},
        {"check": "no slice ran out of memory", "value": seen.out_of_memory, "passed": not seen.out_of_memory},
        {
            "check": f"mean share of KV blocks in use at least {HIGH_USE:.0%}",
            "value": counts["kv_use_mean"],
            "passed": (counts["kv_use_mean"] or 0.0) >= HIGH_USE,
        },
        {
            "check": "the ledger's books balance (check_integrity)",
            "value": seen.ledger_errors[:3],
            "passed": not seen.ledger_errors if "ledger_error" in status else None,
        },
        {"check": "all KV blocks free at the end", "value": all_blocks_free, "passed": all_blocks_free},
        *(
            _flat_check(f"{name.removesuffix('_rss_bytes')}: resident memory is flat", trend)
            for name, trend in trends.items()
        ),
        _flat_check(
            "worker: heap memory in use is flat (no leak; resident memory also counts the heap's holes)",
            heap_trend,
        ),
    ]
    return {
        "elapsed_s": elapsed_s,
        "requests": seen.done,
        "output_tokens": seen.tokens,
        "errors": seen.errors[:10],
        "steps": seen.steps,
        "failed_steps": seen.failed_steps[:10],
        "pairs_per_s": seen.pairs / elapsed_s,
        "counts": counts,
        "share_of_time_full": full_share,
        "status": status,
        "ttft": seen.ttft.summary(),
        "tbt": seen.tbt.summary(),
        "rss": {name: None if trend is None else trend.model_dump() for name, trend in trends.items()},
        "heap_in_use": None if heap_trend is None else heap_trend.model_dump(),
        "series": seen.readings[::every],
        "checks": checks,
    }


def _flat_check(title: str, trend: Trend | None) -> dict[str, Any]:
    """Bytes per hour, their interval and whether it contains 0; all None if there were too few readings."""
    return {
        "check": title,
        "value": None if trend is None else trend.bytes_per_hour,
        "interval": None if trend is None else [trend.low, trend.high],
        "passed": None if trend is None else trend.is_flat,
    }


class _Soak:
    """Clients that send their next request when one ends, a feeder of steps, and a watch on the processes."""

    def __init__(self, live: LiveEngine, job: Job, note: Note) -> None:
        self.seen = _Seen()
        self._live = live
        self._note = note
        self._trace = job.trace
        self._vocabulary = vocab_size(job.model_dir)
        self._requests = self._trace.requests()
        self._rng = np.random.default_rng(self._trace.seed)
        engine = WatchedEngine(live, system_prompts(SYSTEM_TOKENS, self._vocabulary, self._trace.seed))
        self._engine = engine
        self._feeder = FineTuneFeeder(
            engine,
            self._trace.finetune,
            pairs_per_step=self._trace.args.training.pairs_per_step,
            vocab_size=self._vocabulary,
            seed=self._trace.seed,
        )
        some = itertools.islice(self._trace.requests(), 200)
        tokens_each = statistics.fmean(request.num_prompt_tokens + request.num_output_tokens for request in some)
        self.num_clients = 1 + int(_OVERSUBSCRIBED * (live.engine.kv_cache_tokens or 0) / tokens_each)
        self._started_s = time.perf_counter()
        self._is_over = False
        self.counts = Counts()
        """Of the time under load."""

    async def run(self, seconds: float) -> float:
        """Load for that long, then wait for what runs; seconds that the load lasted.

        Raises:
            MaceError: requests are still running two minutes after the last one was sent.
        """
        self._feeder.start()
        clients = [asyncio.create_task(self._client()) for _ in range(self.num_clients)]
        try:
            await self._watch(seconds)
            elapsed_s = self._now_s()
            self.counts = self._live.stats.read()
            self._is_over = True
            _, late = await asyncio.wait(clients, timeout=_DRAIN_S)
        finally:
            for client in clients:
                client.cancel()
            await self._feeder.stop()
        if late:
            raise MaceError(f"{len(late)} requests did not end within {_DRAIN_S:.0f} s")
        await asyncio.sleep(_POLL_S)  # aborted steps reach the worker
        return elapsed_s

    def _now_s(self) -> float:
        return time.perf_counter() - self._started_s

    async def _client(self) -> None:
        for request in self._requests:
            if self._is_over:
                return
            await self._send(request)

    async def _send(self, request: TraceRequest) -> None:
        prompt = self._rng.integers(0, self._vocabulary, request.num_prompt_tokens).tolist()
        sent_s = last_s = time.perf_counter()
        count = 0
        try:
            async for ids in self._engine.decode(prompt, request.request_id, request.num_output_tokens):
                now_s = time.perf_counter()
                (self.seen.tbt if count else self.seen.ttft).add(now_s - (last_s if count else sent_s))
                count, last_s = len(ids), now_s
        except Exception as error:  # noqa: BLE001 - a failed request is a result of the soak
            self.seen.errors.append(f"{request.request_id}: {type(error).__name__}: {error}")
            return
        if count < request.num_output_tokens:
            self.seen.errors.append(f"{request.request_id}: {count} of {request.num_output_tokens} tokens")
        self.seen.done += 1
        self.seen.tokens += count

    async def _watch(self, seconds: float) -> None:
        after, _ = await self._engine.iterations(0)
        processes = dict(engine_processes())
        noted_s = 0.0
        for number in itertools.count():
            await asyncio.sleep(_POLL_S)
            after = await self._poll(after)
            if number % _READ_EVERY == 0:
                await self._read(processes)
            if self._now_s() - noted_s >= _NOTE_EVERY_S:
                noted_s = self._now_s()
                self._note(self._line())
            if self._now_s() >= seconds:
                return

    async def _poll(self, after: int) -> int:
        newest, samples = await self._live.engine.iterations(after)
        seen = self.seen
        seen.out_of_memory += sum(sample.report.out_of_memory for sample in samples)
        seen.num_polls += 1
        seen.num_full += self._live.stats.kv_use >= HIGH_USE
        for task in self._feeder.finished:
            seen.steps += task.error is None
            seen.pairs += task.num_pairs if task.error is None else 0
            if task.error is not None:
                seen.failed_steps.append(task.error)
        self._feeder.finished.clear()
        return newest

    async def _read(self, processes: dict[str, psutil.Process]) -> None:
        reading = {"time_s": self._now_s(), "kv_use": self._live.stats.kv_use}
        for name, process in processes.items():
            reading[f"{name}_rss_bytes"] = float(process.memory_info().rss)
        status = await self._live.engine.memory_status()
        reading.update({key: float(value) for key, value in status.items() if isinstance(value, int | float)})
        if status.get("ledger_error"):
            self.seen.ledger_errors.append(str(status["ledger_error"]))
        self.seen.readings.append(reading)

    def _line(self) -> str:
        counts, seen = self._live.stats.read(), self.seen
        last = seen.readings[-1]
        sizes = ", ".join(f"{k.removesuffix('_rss_bytes')} {v / 2**20:.0f}" for k, v in last.items() if "rss" in k)
        return (
            f"soak, {self._now_s() / 60:.1f} min: {seen.done} requests, {len(seen.errors)} errors, {seen.steps} steps, "
            f"KV use {counts.kv_use_mean or 0:.1%} (now {last['kv_use']:.1%}), {counts.preemptions} preempted, "
            f"{last.get('pruned_blocks', 0):.0f} blocks pruned, MiB: {sizes}"
        )


def engine_processes() -> Iterator[tuple[str, psutil.Process]]:
    """This process and the engine's, by a name for reports."""
    me = psutil.Process()
    yield "client", me
    for child in me.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(child.cmdline())
            for mark, name in (("VLLM::EngineCore", "engine_core"), ("VLLM::Worker", "worker")):
                if mark in title:
                    yield name, child
