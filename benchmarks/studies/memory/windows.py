"""Measuring windows on engines that stay: every setting has one, and they take turns.

Engines that are idle take no processor time (measured: below 1 % of a core each), so several can be alive while one
is measured. Windows of two settings that are compared follow one another within half a minute, which a start of an
engine in between would not allow; drift of a noisy machine falls on both.
"""

import asyncio
import contextlib
import math
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict

from benchmarks.harness.client import EnginePort, Load, Request
from benchmarks.harness.jobs import Job, serve
from benchmarks.harness.models import args_for, start_engine, vocab_size
from benchmarks.harness.results import RunMetrics
from benchmarks.harness.statistics import mean
from core.batch import IterationSample
from core.config import AppArgs
from core.errors import MaceError
from core.types import FineTuneTask, TaskResult

if TYPE_CHECKING:
    from engine.vllm.engine import HybridEngine

NUM_SYSTEM_PROMPTS = 4
"""Requests choose among so many, by their names: a server has more than one application."""

_SETTLE_S = 0.3
"""After the last request: aborts reach the engine."""
_FIRST_WARM_UP_S = 12.0
"""Warm-up of a fresh engine, which has no latency model yet."""
_TOTALS = ("pruned_blocks", "pruned_requests", "preemptions", "small_slices", "prunes", "deferrals")
"""Keys of the engine's memory status that only grow."""
_CAPACITY_OUTPUT_TOKENS = 64
_CAPACITY_LIMIT_S = 120.0
"""Limit of one try of a batch."""


class Counts(BaseModel):
    """Counts of vLLM about memory between two moments. Shares are in 0..1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix_queries: int = 0
    """Prompt tokens of requests that began; a request that comes back after a preemption is not counted again."""
    prefix_hits: int = 0
    """Those of them that the prefix cache held."""
    preemptions: int = 0
    num_iterations: int = 0
    kv_use_mean: float | None = None
    """Share of the KV blocks in use, mean over iterations. Cached blocks that nobody uses are free."""
    kv_use_max: float | None = None
    max_running: int = 0
    """Most requests that ran at once."""

    @property
    def hit_ratio(self) -> float | None:
        """Share of prompt tokens that were not computed; None without a request."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else None


class StatLog:
    """A stat logger of vLLM (one engine) that adds up."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._totals: Counter[str] = Counter()
        self._max_running = 0
        self._kv_uses: list[float] = []

    @property
    def kv_use(self) -> float:
        """Share of the KV blocks in use in the last iteration."""
        return self._kv_uses[-1] if self._kv_uses else 0.0

    def read(self) -> Counts:
        """Counts since the last `clear`."""
        uses = self._kv_uses
        return Counts(
            **self._totals,
            num_iterations=len(uses),
            kv_use_mean=mean(uses),
            kv_use_max=max(uses, default=None),
            max_running=self._max_running,
        )

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Called by vLLM after every iteration that has something to say."""
        if scheduler_stats is not None:
            prefix = scheduler_stats.prefix_cache_stats
            self._totals.update(prefix_queries=prefix.queries, prefix_hits=prefix.hits)
            self._kv_uses.append(scheduler_stats.kv_cache_usage)
            self._max_running = max(self._max_running, scheduler_stats.num_running_reqs)
        if iteration_stats is not None:
            self._totals.update(preemptions=iteration_stats.num_preempted_reqs)

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface; nothing to say."""

    def log(self) -> None:
        """Part of vLLM's interface; nothing to say."""

    def record_sleep_state(self, *_: Any) -> None:
        """Part of vLLM's interface; the engine never sleeps here."""


class WindowResult(BaseModel):
    """The numbers of one window."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: RunMetrics
    counts: Counts
    status: dict[str, Any] = {}
    """The engine's memory status; totals are differences over the window with its warm-up."""
    other_cpu_share: float = 0.0
    """Share of all cores that processes other than the benchmark's took: noise. 0 to 1."""
    all_blocks_free: bool = True
    """True if every KV block was free when the window and its training were over."""


class WatchedEngine:
    """A `MeasuredEngine` whose requests begin with a shared prompt, and whose counters begin with the window."""

    def __init__(self, engine: "HybridEngine", stats: StatLog) -> None:
        self.engine = engine
        self.stats = stats
        """One of the engine's loggers."""
        self.prompts: Sequence[Sequence[int]] = ()
        """System prompts."""
        self.is_fresh = True

    def decode(
        self, prompt_ids: Sequence[int], request_id: str, max_tokens: int, handle: Any = None, priority: int = 0
    ) -> AsyncIterator[list[int]]:
        """Decode on the engine, with the first tokens replaced; at least one stays the request's own."""
        shared = self.prompts[zlib.crc32(request_id.encode()) % len(self.prompts)] if self.prompts else ()
        shared = shared[: len(prompt_ids) - 1]
        ids = [*shared, *prompt_ids[len(shared) :]]
        return self.engine.decode(ids, request_id, max_tokens, handle, priority)

    async def run_task(self, task: FineTuneTask) -> TaskResult:
        """Run the task on the engine."""
        return await self.engine.run_task(task)

    async def iterations(self, after: int) -> tuple[int, list[IterationSample]]:
        """Return the engine's samples. A window asks from 0 exactly once, when it opens."""
        if after == 0:
            self.stats.clear()
        return await self.engine.iterations(after)

    def share_prompts(self, num_tokens: int, vocabulary: int, seed: int) -> None:
        """Let requests begin with one of `NUM_SYSTEM_PROMPTS` random prompts of that length; 0: with none."""
        rng = np.random.default_rng([seed, 2])
        self.prompts = rng.integers(0, vocabulary, (NUM_SYSTEM_PROMPTS, num_tokens)).tolist() if num_tokens else ()


class EnginePool:
    """Starts an engine when it is first asked for, and keeps it."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.vocabulary = vocab_size(model_dir)
        self._engines: dict[str, WatchedEngine] = {}

    async def get(self, setting: str, args: AppArgs) -> WatchedEngine:
        """Return the engine of this setting, with these options if it is started now."""
        if setting not in self._engines:
            stats = StatLog()
            args = args_for("long", self.model_dir, args)
            engine = await start_engine(args, self.model_dir, [lambda _config, _engine_index=0: stats])
            self._engines[setting] = WatchedEngine(engine, stats)
        return self._engines[setting]

    async def measure(self, setting: str, job: Job, system_tokens: int) -> WindowResult:
        """Run the window of a job; the prefix cache is empty when its warm-up begins.

        `system_tokens` is the length of the system prompt that a request shares with others.
        """
        watched = await self.get(setting, job.trace.args)
        if watched.is_fresh:
            job = job.model_copy(update={"warm_up_s": max(job.warm_up_s, _FIRST_WARM_UP_S)})
            watched.is_fresh = False
        watched.share_prompts(system_tokens, self.vocabulary, job.trace.seed)
        before, machine = await watched.engine.memory_status(), _cpu_seconds()
        metrics = await serve(watched, job, self.vocabulary)
        total_s, other_s = (after - start for after, start in zip(_cpu_seconds(), machine, strict=True))
        counts = watched.stats.read()
        status = status_between(before, await watched.engine.memory_status())
        await asyncio.sleep(_SETTLE_S)
        return WindowResult(
            metrics=metrics,
            counts=counts,
            status=status,
            other_cpu_share=max(0.0, other_s) / max(1e-9, total_s),
            all_blocks_free=await watched.engine.client.reset_prefix_cache(),
        )

    def shutdown(self) -> None:
        """Stop all engines."""
        for watched in self._engines.values():
            watched.engine.shutdown()


def _cpu_seconds() -> tuple[float, float]:
    """Seconds of all cores since the machine began: in all, and busy with neither this process nor its children."""
    machine = psutil.cpu_times()
    total_s = sum(machine[:8])  # the rest of the fields is counted in these
    own_s = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            own_s += sum(process.cpu_times()[:2])
    return total_s, total_s - machine.idle - machine.iowait - own_s


def status_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the later status, with what only grows as the growth."""
    return {**after, **{k: after[k] - before.get(k, 0) for k in _TOTALS if after.get(k) is not None}}


async def largest_that_fits(
    guess: int, most: int, fits: Callable[[int], Awaitable[bool]]
) -> tuple[int, list[int]]:
    """Find the largest number from 0 to `most` that fits, if whatever is smaller fits too; and what was tried.

    The search goes from `guess`; `fits` is asked for one number at a time.
    """
    low, high, tried = 0, most + 1, []
    number = min(max(1, guess), most)
    while low + 1 < high:
        tried.append(number)
        low, high = (number, high) if await fits(number) else (low, number)
        number = (low + high) // 2
    return low, tried


async def measure_capacity(
    watched: WatchedEngine, context_tokens: int, fraction: float, vocabulary: int
) -> dict[str, Any]:
    """Search for the largest batch that runs with nobody waiting and nobody preempted, on an idle engine.

    Args:
        watched: the engine.
        context_tokens: of each request at its end, prompt and answer together.
        fraction: of the blocks that the engine may drop; where the search begins follows from it.
        vocabulary: prompts are random ids below this.

    Returns:
        `fit_without_pruning` is by arithmetic: blocks of the pool over blocks of a request.
    """
    client = watched.engine.client
    cache = client.vllm_config.cache_config
    plain = (cache.num_gpu_blocks - 1) // math.ceil(context_tokens / cache.block_size)
    rng = np.random.default_rng(context_tokens)

    async def fits(batch: int) -> bool:
        prompts = rng.integers(0, vocabulary, (batch, context_tokens - _CAPACITY_OUTPUT_TOKENS)).tolist()
        watched.stats.clear()
        load = Load(EnginePort(watched.engine))
        for number, prompt in enumerate(prompts):
            load.send(Request(f"capacity-{batch}-{number}", prompt, max_tokens=_CAPACITY_OUTPUT_TOKENS))
        await load.drain(_CAPACITY_LIMIT_S)
        if errors := [record.error for record in load.records if record.error]:
            raise MaceError(f"a batch of {batch} failed: {errors[0]}")
        counts = watched.stats.read()
        return counts.preemptions == 0 and counts.max_running == batch

    most = min(client.vllm_config.scheduler_config.max_num_seqs, 4 * plain)
    batch, tried = await largest_that_fits(int(plain / (1 - fraction)), most, fits)
    await client.reset_prefix_cache()
    return {"context_tokens": context_tokens, "batch": batch, "fit_without_pruning": plain, "tried": tried}
