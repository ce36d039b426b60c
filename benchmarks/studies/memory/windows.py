"""Measuring windows on engines that stay: every setting has one, and they take turns.

Engines that are idle take no processor time (measured: below 1 % of a core each), so several can be alive while one
is measured. Windows of two settings that are compared follow one another within half a minute, which a start of an
engine in between would not allow; drift of a noisy machine falls on both.
"""

import asyncio
import contextlib
import math
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict

from benchmarks.harness.client import EnginePort, Load, Request
from benchmarks.harness.jobs import Job, serve
from benchmarks.harness.models import args_for, vocab_size
from benchmarks.harness.results import RunMetrics
from core.batch import IterationSample
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
    """A stat logger of vLLM (one engine) that adds up. Pass `StatLog.factory()` as one of `stat_loggers`."""

    def __init__(self) -> None:
        self.clear()

    def factory(self) -> Any:
        """Return a function of vLLM's config and the engine's number that always gives this object."""
        return lambda _config, _engine_index=0: self

    def clear(self) -> None:
        """Forget all."""
        self._queries = self._hits = self._preemptions = self._max_running = 0
        self._kv_uses: list[float] = []

    @property
    def kv_use(self) -> float:
        """Share of the KV blocks in use in the last iteration."""
        return self._kv_uses[-1] if self._kv_uses else 0.0

    def read(self) -> Counts:
        """Counts since the last `clear`."""
        uses = self._kv_uses
        return Counts(
            prefix_queries=self._queries,
            prefix_hits=self._hits,
            preemptions=self._preemptions,
            num_iterations=len(uses),
            kv_use_mean=sum(uses) / len(uses) if uses else None,
            kv_use_max=max(uses, default=None),
            max_running=self._max_running,
        )

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Called by vLLM after every iteration that has something to say."""
        if scheduler_stats is not None:
            prefix = scheduler_stats.prefix_cache_stats
            self._queries += prefix.queries
            self._hits += prefix.hits
            self._kv_uses.append(scheduler_stats.kv_cache_usage)
            self._max_running = max(self._max_running, scheduler_stats.num_running_reqs)
        if iteration_stats is not None:
            self._preemptions += iteration_stats.num_preempted_reqs

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


@dataclass(slots=True)
class LiveEngine:
    """An engine with its counters."""

    engine: "HybridEngine"
    stats: StatLog
    is_fresh: bool = True


class EnginePool:
    """Starts an engine when it is first asked for, and keeps it."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.vocabulary = vocab_size(model_dir)
        self._live: dict[str, LiveEngine] = {}

    async def get(self, setting: str, job: Job) -> LiveEngine:
        """Return the engine of this setting, with the options of the job."""
        if setting not in self._live:
            from engine.vllm.compat import configure_environment
            from engine.vllm.engine import HybridEngine

            args = args_for(job.model, self.model_dir, job.trace.args)
            configure_environment(args, self.model_dir)
            stats = StatLog()
            engine = await HybridEngine.start(args, str(self.model_dir), [stats.factory()])
            self._live[setting] = LiveEngine(engine, stats)
        return self._live[setting]

    async def measure(self, setting: str, job: Job, system_tokens: int) -> WindowResult:
        """Run the window of a job; the prefix cache is empty when its warm-up begins.

        `system_tokens` is the length of the system prompt that a request shares with others.
        """
        live = await self.get(setting, job)
        if live.is_fresh:
            job = job.model_copy(update={"warm_up_s": max(job.warm_up_s, _FIRST_WARM_UP_S)})
            live.is_fresh = False
        prompts = system_prompts(system_tokens, self.vocabulary, job.trace.seed)
        before, machine = await live.engine.memory_status(), _cpu_seconds()
        metrics = await serve(WatchedEngine(live, prompts), job, self.vocabulary)
        total_s, other_s = (after - start for after, start in zip(_cpu_seconds(), machine, strict=True))
        counts = live.stats.read()
        status = status_between(before, await live.engine.memory_status())
        await asyncio.sleep(_SETTLE_S)
        return WindowResult(
            metrics=metrics,
            counts=counts,
            status=status,
            other_cpu_share=max(0.0, other_s) / max(1e-9, total_s),
            all_blocks_free=await live.engine.client.reset_prefix_cache(),
        )

    def shutdown(self) -> None:
        """Stop all engines."""
        for live in self._live.values():
            live.engine.shutdown()
        self._live.clear()


class WatchedEngine:
    """A `MeasuredEngine` whose requests begin with a shared prompt, and whose counters begin with the window."""

    def __init__(self, live: LiveEngine, prompts: Sequence[Sequence[int]]) -> None:
        self._live = live
        self._prompts = prompts

    def decode(
        self, prompt_ids: Sequence[int], request_id: str, max_tokens: int, handle: Any = None, priority: int = 0
    ) -> AsyncIterator[list[int]]:
        """Decode on the engine, with the first tokens replaced; at least one stays the request's own."""
        shared = self._prompts[zlib.crc32(request_id.encode()) % len(self._prompts)] if self._prompts else ()
        shared = shared[: len(prompt_ids) - 1]
        ids = [*shared, *prompt_ids[len(shared) :]]
        return self._live.engine.decode(ids, request_id, max_tokens, handle, priority)

    async def run_task(self, task: FineTuneTask) -> TaskResult:
        """Run the task on the engine."""
        return await self._live.engine.run_task(task)

    async def iterations(self, after: int) -> tuple[int, list[IterationSample]]:
        """Return the engine's samples. A window asks from 0 exactly once, when it opens."""
        if after == 0:
            self._live.stats.clear()
        return await self._live.engine.iterations(after)


def _cpu_seconds() -> tuple[float, float]:
    """Seconds of all cores since the machine began: in all, and busy with neither this process nor its children."""
    machine = psutil.cpu_times()
    total_s = sum(machine[:8])  # the rest of the fields is counted in these
    own_s = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            own_s += times.user + times.system
    return total_s, total_s - machine.idle - machine.iowait - own_s


def system_prompts(num_tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Draw `NUM_SYSTEM_PROMPTS` prompts of that length; none if they would be empty."""
    if num_tokens == 0:
        return []
    rng = np.random.default_rng([seed, 2])
    return rng.integers(0, vocabulary, (NUM_SYSTEM_PROMPTS, num_tokens)).tolist()


def status_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the later status, with what only grows as the growth."""
    return {**after, **{k: after[k] - before.get(k, 0) for k in _TOTALS if after.get(k) is not None}}


async def largest_that_fits(
    guess: int, most: int, fits: Callable[[int], Awaitable[bool]]
) -> tuple[int, list[int]]:
    """Find the largest number from 0 to `most` that fits, if whatever is smaller fits too; and what was tried.

    Args:
        guess: tried first; the search goes from there.
        most: not tried above this.
        fits: asked for one number at a time.
    """
    low, high, tried = 0, most + 1, []
    number = min(max(1, guess), most)
    while low + 1 < high:
        tried.append(number)
        low, high = (number, high) if await fits(number) else (low, number)
        number = (low + high) // 2
    return low, tried


async def measure_capacity(
    live: LiveEngine, context_tokens: int, fraction: float, vocabulary: int
) -> dict[str, Any]:
    """Search for the largest batch that runs with nobody waiting and nobody preempted, on an idle engine.

    Args:
        live: the engine.
        context_tokens: of each request at its end, prompt and answer together.
        fraction: of the blocks that the engine may drop; where the search begins follows from it.
        vocabulary: prompts are random ids below this.

    Returns:
        `context_tokens`, `batch`, `tried`, and `fit_without_pruning` by arithmetic: blocks of the pool over blocks
        of a request.
    """
    config = live.engine.client.vllm_config
    plain = (config.cache_config.num_gpu_blocks - 1) // math.ceil(context_tokens / config.cache_config.block_size)
    rng = np.random.default_rng(context_tokens)

    async def fits(batch: int) -> bool:
        prompts = rng.integers(0, vocabulary, (batch, context_tokens - _CAPACITY_OUTPUT_TOKENS)).tolist()
        live.stats.clear()
        load = Load(EnginePort(live.engine))
        for number, prompt in enumerate(prompts):
            load.send(Request(f"capacity-{batch}-{number}", prompt, max_tokens=_CAPACITY_OUTPUT_TOKENS))
        await load.drain(_CAPACITY_LIMIT_S)
        if errors := [record.error for record in load.records if record.error]:
            raise MaceError(f"a batch of {batch} failed: {errors[0]}")
        counts = live.stats.read()
        return counts.preemptions == 0 and counts.max_running == batch

    most = min(config.scheduler_config.max_num_seqs, 4 * plain)
    batch, tried = await largest_that_fits(int(plain / (1 - fraction)), most, fits)
    await live.engine.client.reset_prefix_cache()
    return {"context_tokens": context_tokens, "batch": batch, "fit_without_pruning": plain, "tried": tried}
