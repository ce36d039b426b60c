"""Run a grid of points on a real engine and collect what its iterations took."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from core.batch import IterationSample
from core.dpo_slices import PairGroup
from core.types import FineTuneTask, TaskKind, TaskResult, TokenizedPair
from profiler.fit import MemorySample
from profiler.grid import DECODE_TOKENS, MIXED_TOKENS, GridPoint, MeasurePlan, PointKind, make_grid

logger = logging.getLogger(__name__)

_POLL_S = 0.01
_ROW_TOKENS = 128
"""Width of the rows of measured micro-batches; more tokens are more pairs."""
_WARM_UP = (GridPoint(PointKind.DECODE, 0, 8, 2), GridPoint(PointKind.PREFILL, 64))


class ProfiledEngine(Protocol):
    """What measuring needs of an engine; `engine.vllm.engine.HybridEngine` is the real one."""

    def decode(
        self, prompt_ids: Sequence[int], request_id: str, max_tokens: int, handle: Any = None, priority: int = 0
    ) -> AsyncIterator[list[int]]:
        """Greedy tokens so far, after each token; past end-of-sequence. Cancelling aborts the request."""
        ...

    async def run_task(self, task: FineTuneTask) -> TaskResult:
        """Run a fine-tune task to its end; cancelling aborts it."""
        ...

    async def iterations(self, after: int = 0) -> tuple[int, list[IterationSample]]:
        """Samples since number `after`, and the number to ask for next."""
        ...

    def num_unfinished_requests(self) -> int:
        """Requests in the engine, fine-tune tasks included."""
        ...


@dataclass(slots=True)
class Measurement:
    """What a measurement gave."""

    samples: list[IterationSample] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    num_points: int = 0
    num_interrupted: int = 0
    measured_s: float = 0.0


async def measure_grid(
    engine: ProfiledEngine, plan: MeasurePlan, on_progress: Callable[[Measurement], None] | None = None
) -> Measurement:
    """Measure until the budget is used or the grid was measured `plan.max_rounds` times.

    Raises:
        MaceError: the engine ended a task without a result.
    """
    return await _Measurer(engine, plan, on_progress).run()


class _Measurer:
    def __init__(
        self, engine: ProfiledEngine, plan: MeasurePlan, on_progress: Callable[[Measurement], None] | None
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._on_progress = on_progress
        self._rng = random.Random(plan.seed)
        self._prefix = f"profile-{self._rng.getrandbits(32):08x}"
        self._num_requests = 0
        self._in_flight = 0
        self._next_iteration = 0
        self._walls: dict[PointKind, list[tuple[int, float]]] = {}
        self._result = Measurement()

    async def run(self) -> Measurement:
        for point in _WARM_UP:  # first calls load kernels and fill caches: run, but not recorded
            await self._until_done(point)
        self._next_iteration, _ = await self._engine.iterations(0)
        self._result = Measurement()
        self._walls.clear()
        grid = make_grid(self._plan)
        for _ in range(self._plan.max_rounds):
            await self._round(grid)
            if self._left_s() <= 0:
                break
        return self._result

    async def _round(self, grid: list[GridPoint]) -> None:
        """Every point once; those that seem too long are looked at again once more is known."""
        waiting = grid
        while waiting:
            deferred = []
            for point in waiting:
                if self._left_s() <= 0:
                    return
                if self._expected_s(point) > min(self._plan.max_point_s, self._left_s()):
                    deferred.append(point)
                    continue
                await self._until_done(point)
                await self._collect()
            if len(deferred) == len(waiting):
                return
            waiting = deferred

    def _left_s(self) -> float:
        return self._plan.budget_s - self._result.measured_s

    def _expected_s(self, point: GridPoint) -> float:
        """In proportion to the measured point of the same kind that is nearest in work; 0 if there is none."""
        done = self._walls.get(point.kind)
        if not done:
            return 0.0
        work, wall_s = min(done, key=lambda entry: abs(entry[0] - point.work))
        return wall_s * max(1.0, point.work / max(1, work))

    async def _until_done(self, point: GridPoint) -> None:
        while True:
            if self._plan.is_background:
                await self._idle()
            started_s = time.perf_counter()
            finished = await self._attempt(point)
            wall_s = time.perf_counter() - started_s
            self._result.measured_s += wall_s
            if finished:
                self._walls.setdefault(point.kind, []).append((point.work, wall_s))
                self._result.num_points += 1
                return
            self._result.num_interrupted += 1
            if self._left_s() <= 0:
                return

    async def _idle(self) -> None:
        while self._engine.num_unfinished_requests() > self._in_flight:  # noqa: ASYNC110 - vLLM has no event
            await asyncio.sleep(_POLL_S)

    async def _attempt(self, point: GridPoint) -> bool:
        """Run one point; False if it gave way to a request."""
        work = asyncio.create_task(self._run_point(point))
        try:
            while self._plan.is_background and not work.done():
                await asyncio.wait({work}, timeout=_POLL_S)
                if not work.done() and self._engine.num_unfinished_requests() > self._in_flight:
                    return False
            await work
            return True
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _collect(self) -> None:
        self._next_iteration, samples = await self._engine.iterations(self._next_iteration)
        self._result.samples += samples
        if self._on_progress is not None:
            self._on_progress(self._result)

    async def _run_point(self, point: GridPoint) -> None:
        if point.kind is PointKind.PREFILL:
            prefix = self._tokens(point.context)
            if prefix:
                await self._decode(prefix, 1)
            await self._decode(prefix + self._tokens(point.num_tokens), 1)
        elif point.kind is PointKind.DECODE:
            await self._together(point, DECODE_TOKENS)
        elif point.kind is PointKind.MIXED:
            await self._together(point, MIXED_TOKENS)
        else:
            await self._run_task(point)

    async def _together(self, point: GridPoint, num_tokens: int) -> None:
        """`batch` requests at once; with `num_tokens` of the point, one more prompt once they all decode."""
        started = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(point.batch):
                group.create_task(self._decode(self._tokens(point.context), num_tokens, started))
            if point.num_tokens:
                await started.wait()
                group.create_task(self._decode(self._tokens(point.num_tokens), 1))

    async def _decode(self, prompt_ids: list[int], num_tokens: int, started: asyncio.Event | None = None) -> None:
        self._num_requests += 1
        self._in_flight += 1
        request_id = f"{self._prefix}-{self._num_requests}"
        try:
            outputs = self._engine.decode(prompt_ids, request_id, num_tokens, priority=1)
            async for ids in outputs:
                if started is not None and len(ids) >= 4:
                    started.set()
        finally:
            self._in_flight -= 1

    async def _run_task(self, point: GridPoint) -> None:
        kind = TaskKind.TRAIN if point.kind is PointKind.TRAIN else TaskKind.EVALUATE
        self._num_requests += 1
        pairs, num_tokens = self._pairs(point.num_tokens)
        self._in_flight += 1
        try:
            task = FineTuneTask(f"{self._prefix}-{self._num_requests}", kind, pairs)
            result = await self._engine.run_task(task)
        finally:
            self._in_flight -= 1
        if result.error is not None:  # random tokens may well diverge; the slices before are measured all the same
            logger.info("a measured fine-tune task ended early: %s", result.error)
        elif kind is TaskKind.TRAIN and result.peak_bytes:
            self._result.memory.append(MemorySample(num_tokens, result.peak_bytes))

    def _pairs(self, num_tokens: int) -> tuple[tuple[TokenizedPair, ...], int]:
        """Pairs that make one micro-batch of at most `num_tokens` tokens, padding included, and its true size."""
        width = min(num_tokens // 2, _ROW_TOKENS, self._plan.max_pair_tokens - 1)
        half = width // 2
        lengths = (half, width - half + 1, width - half + 1)
        pair_tokens = PairGroup.of(lengths, may_share=self._plan.share_prompt).num_tokens
        count = max(1, num_tokens // pair_tokens)
        pairs = []
        for number in range(count):
            prompt, chosen, rejected = (tuple(self._tokens(n)) for n in lengths)
            if chosen == rejected:
                rejected = (*rejected[:-1], (rejected[-1] + 1) % self._plan.vocab_size)
            pairs.append(TokenizedPair(f"p{number}", prompt, chosen, rejected))
        return tuple(pairs), pair_tokens * count

    def _tokens(self, count: int) -> list[int]:
        """Random ids, so that no prefix cache knows them."""
        return self._rng.choices(range(self._plan.vocab_size), k=count)
