"""Measuring windows on engines that stay: every setting has one, and they take turns.

Engines that are idle take no processor time (measured: below 1 % of a core each), so several can be alive while one
is measured. Windows of two settings that are compared follow one another within half a minute, which a start of an
engine in between would not allow; drift of a noisy machine falls on both.
"""

import asyncio
import contextlib
import logging
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict

from benchmarks.harness.jobs import Job, serve
from benchmarks.harness.models import args_for, vocab_size
from benchmarks.harness.results import RunMetrics
from benchmarks.studies.memory.counts import Counts, StatLog
from core.batch import IterationSample
from core.config import AppArgs
from core.types import FineTuneTask, TaskResult

if TYPE_CHECKING:
    from engine.vllm.engine import HybridEngine

logger = logging.getLogger(__name__)

_Setting = TypeVar("_Setting")

NUM_SYSTEM_PROMPTS = 4
"""Requests choose among so many, by their names: a server has more than one application."""

_SETTLE_S = 0.3
"""After the last request: aborts reach the engine."""
_FIRST_WARM_UP_S = 12.0
"""On a fresh engine, which has no latency model yet."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One window: what is measured, on which engine."""

    part: str
    case: str
    """What the trace is like."""
    setting: str
    """Name of the engine."""
    repeat: int
    job: Job
    """Its `trace.args` are the settings of the engine."""
    system_tokens: int = 0
    """Length of the system prompt that a request shares with others."""

    @property
    def key(self) -> str:
        """Unique in a report."""
        return f"{self.part}/{self.case}/{self.setting}/{self.repeat}"


def in_turns(settings: Sequence[_Setting], repeat: int) -> Sequence[_Setting]:
    """The order of one repeat: who is first changes from one to the next."""
    return settings if repeat % 2 == 0 else settings[::-1]


class WindowResult(BaseModel):
    """The numbers of one window."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: RunMetrics
    counts: Counts
    status: dict[str, Any] = {}
    """What the engine says about its memory; totals are differences over the window with its warm-up."""
    other_cpu_share: float = 0.0
    """Of all cores, what processes that are not the benchmark's took: noise. 0 to 1."""
    all_blocks_free: bool = True
    """Whether every KV block was free when the window and its training were over."""


@dataclass(slots=True)
class LiveEngine:
    """An engine with its counters."""

    engine: "HybridEngine"
    stats: StatLog
    is_fresh: bool = True


class EnginePool:
    """Starts an engine when it is first asked for, and keeps it."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._vocabulary = vocab_size(model_dir)
        self._live: dict[str, LiveEngine] = {}

    async def get(self, setting: str, job: Job) -> LiveEngine:
        """The engine of this setting."""
        if setting not in self._live:
            from engine.vllm.compat import configure_environment
            from engine.vllm.engine import HybridEngine

            args = args_for(job.model, self._model_dir, job.trace.args)
            configure_environment(args, self._model_dir)
            stats = StatLog()
            engine = await HybridEngine.start(args, str(self._model_dir), [stats.factory()])
            self._live[setting] = LiveEngine(engine, stats)
        return self._live[setting]

    async def measure(self, cell: Cell) -> WindowResult:
        """Run the window of a cell; the prefix cache is empty when its warm-up begins."""
        live = await self.get(cell.setting, cell.job)
        job = cell.job
        if live.is_fresh:
            job = job.model_copy(update={"warm_up_s": max(job.warm_up_s, _FIRST_WARM_UP_S)})
            live.is_fresh = False
        prompts = system_prompts(cell.system_tokens, self._vocabulary, job.trace.seed)
        before = await live.engine.memory_status()
        machine = CpuWatch()
        metrics = await serve(WatchedEngine(live, prompts), job, self._vocabulary)
        others = machine.other_share()
        counts = live.stats.read()
        status = status_between(before, await live.engine.memory_status())
        await asyncio.sleep(_SETTLE_S)
        is_free = await live.engine.client.reset_prefix_cache()
        return WindowResult(
            metrics=metrics, counts=counts, status=status, other_cpu_share=others, all_blocks_free=is_free
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
        """As the engine does, with the first tokens replaced; at least one stays the request's own."""
        shared = self._prompts[zlib.crc32(request_id.encode()) % len(self._prompts)] if self._prompts else ()
        shared = shared[: len(prompt_ids) - 1]
        ids = [*shared, *prompt_ids[len(shared) :]]
        return self._live.engine.decode(ids, request_id, max_tokens, handle, priority)

    async def run_task(self, task: FineTuneTask) -> TaskResult:
        """As the engine does."""
        return await self._live.engine.run_task(task)

    async def iterations(self, after: int) -> tuple[int, list[IterationSample]]:
        """As the engine does. The client asks from 0 exactly once, when the window opens."""
        if after == 0:
            self._live.stats.clear()
        return await self._live.engine.iterations(after)


class CpuWatch:
    """What other processes take of the machine from now on."""

    def __init__(self) -> None:
        self._begin = _cpu_seconds()

    def other_share(self) -> float:
        """Of all cores, since the start."""
        (total_s, busy_s, own_s), begin = _cpu_seconds(), self._begin
        return max(0.0, (busy_s - begin[1]) - (own_s - begin[2])) / max(1e-9, total_s - begin[0])


def _cpu_seconds() -> tuple[float, float, float]:
    """Of all cores since the machine began: in all, not idle; and of this process with its children."""
    machine = psutil.cpu_times()
    total_s = sum(machine[:8])  # the rest of the fields is counted in these
    own_s = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            own_s += times.user + times.system
    return total_s, total_s - machine.idle - machine.iowait, own_s


def system_prompts(num_tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """`NUM_SYSTEM_PROMPTS` of that length; none if they would be empty."""
    if num_tokens == 0:
        return []
    rng = np.random.default_rng([seed, 2])
    return rng.integers(0, vocabulary, (NUM_SYSTEM_PROMPTS, num_tokens)).tolist()


TOTALS = ("pruned_blocks", "pruned_requests", "preemptions", "small_slices", "prunes", "deferrals")
"""Keys of the status that only grow."""


def status_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The later status, with what only grows as the growth."""
    grown = {key: after[key] - before.get(key, 0) for key in TOTALS if after.get(key) is not None}
    return {**after, **grown}


def with_engine_kwargs(args: AppArgs, **kwargs: Any) -> AppArgs:
    """The settings with these of vLLM's options on top."""
    merged = {**args.engine.engine_kwargs, **kwargs}
    return args.model_copy(update={"engine": args.engine.model_copy(update={"engine_kwargs": merged})})
