"""Measure a device: run a grid of points on a real engine, alone or beside its users, and collect the iterations."""

import asyncio
import contextlib
import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from core.batch import IterationSample
from core.dpo_slices import PairGroup
from core.ports import EnginePort
from core.types import FineTuneTask, TaskKind, TokenizedPair
from profiler.fit import fit_profile
from profiler.profile import Origin, Profile

logger = logging.getLogger(__name__)

MEASURE_S = 60.0
"""Measuring time of a profile."""
_POLL_S = 0.01
_QUIET_S = 0.5
"""In the background nothing is measured for so long after a request: the client's next one would wait for it."""
_ROW_TOKENS = 128
"""Width of the rows of measured micro-batches; more tokens are more pairs."""


class PointKind(StrEnum):
    """Kinds of work that one point runs."""

    PREFILL = "prefill"
    """One prompt whose first `context` tokens are cached already."""
    DECODE = "decode"
    """`batch` prompts of `context` tokens, then some tokens of each."""
    MIXED = "mixed"
    """Like DECODE, with a prompt of `num_tokens` coming in between: hybrid iterations."""
    EVALUATE = "evaluate"
    """A fine-tune task that changes nothing: one micro-batch of `num_tokens` padded tokens."""
    TRAIN = "train"
    """A DPO step on one micro-batch of `num_tokens` padded tokens."""


_DECODED_TOKENS = {PointKind.DECODE: 12, PointKind.MIXED: 16}
"""Tokens that each request of a point decodes."""
_LONGEST_DECODE = 16


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One measurement."""

    kind: PointKind
    num_tokens: int = 0
    context: int = 0
    batch: int = 1

    @property
    def work(self) -> int:
        """Tokens that the point computes or reads; its time grows at most about in proportion."""
        if self.kind in _DECODED_TOKENS:
            return self.batch * (self.context + _DECODED_TOKENS[self.kind]) + self.num_tokens
        return self.context + self.num_tokens


@dataclass(frozen=True, slots=True)
class MeasurePlan:
    """Bounds of a measurement, from the engine's limits."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_tokens: int
    """Tokens of one iteration."""
    max_slice_tokens: int
    """Tokens of one micro-batch; 0: no fine-tune slices."""
    max_pair_tokens: int
    """Tokens of a pair's prompt and completion."""
    max_kv_tokens: int | None = None
    """Tokens that the KV cache holds; None: unknown, batches stay within one sequence of full length."""
    budget_s: float = MEASURE_S
    """Measuring time in all; waiting for the engine to be idle does not count."""
    max_point_s: float = 1.0
    """Points expected to take longer are left out."""
    max_rounds: int = 3
    """Times that the whole grid is measured if the budget allows, each time with new prompts."""
    seed: int = 0
    share_prompt: bool = True
    """`experiments.share_prompt`: how many tokens a pair takes."""
    trains: bool = False
    """TRAIN points change the shadow adapter: only where it is thrown away."""
    is_background: bool = False
    """Wait for an idle engine before each point, and give way to every request that arrives."""


@dataclass(slots=True)
class Measurement:
    """Results so far."""

    samples: list[IterationSample] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Padded tokens of each training step's micro-batch, and the bytes that it held at most."""
    num_points: int = 0
    measured_s: float = 0.0


async def measure_grid(
    engine: EnginePort, plan: MeasurePlan, on_progress: Callable[[Measurement], None] | None = None
) -> Measurement:
    """Measure until the budget is used or the grid was measured `plan.max_rounds` times.

    MaceError: the engine ended a task without a result.
    """
    return await _Measurer(engine, plan, on_progress).run()


async def measure_profile(
    engine: EnginePort,
    plan: MeasurePlan,
    origin: Origin,
    kv_bytes_per_token: int | None = None,
    on_progress: Callable[[Measurement], None] | None = None,
) -> Profile:
    """Measure the grid and fit a profile; ProfileError if too little could be measured, else as `measure_grid`."""
    found = await measure_grid(engine, plan, on_progress)
    return await asyncio.to_thread(
        fit_profile, found.samples, origin, memory=found.memory, kv_bytes_per_token=kv_bytes_per_token
    )


async def measure_in_background(
    engine: EnginePort, plan: MeasurePlan, origin: Origin, path: Path, kv_bytes_per_token: int | None = None
) -> None:
    """Measure beside a running server without hurting its requests, fit, and write the profile.

    Points run only while the engine has no unfinished request, take about a second at most, and are aborted as soon as
    a request arrives. Fine-tune tasks are evaluations, which change nothing; what real training runs meanwhile is
    recorded as well. A failure is a warning: the server goes on with online estimates.

    Raises:
        ValueError: the plan trains, or gives way to nobody.
    """
    if plan.trains or not plan.is_background:
        raise ValueError("a background plan gives way to requests and never trains")
    try:
        profile = await measure_profile(engine, plan, origin, kv_bytes_per_token)
        await asyncio.to_thread(profile.save, path)
    except Exception as error:  # noqa: BLE001 - whatever fails here, serving is not affected
        logger.warning("no profile was measured: %s: %s", type(error).__name__, error)
        return
    logger.info("profile in %s, median error of a forward pass %.1f %%", path, 100 * profile.forward_error.median)


class _Measurer:
    def __init__(
        self, engine: EnginePort, plan: MeasurePlan, on_progress: Callable[[Measurement], None] | None
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._on_progress = on_progress
        self._rng = random.Random(plan.seed)
        self._prefix = f"profile-{self._rng.getrandbits(32):08x}"
        self._num_requests = 0
        self._in_flight = 0
        self._asked_s = -math.inf
        """When the engine last had a request that is not ours."""
        self._next_iteration = 0
        self._walls: dict[PointKind, list[tuple[int, float]]] = {}
        self._result = Measurement()

    async def run(self) -> Measurement:
        # First calls load kernels and fill caches: these two are run, but not recorded.
        for point in (GridPoint(PointKind.DECODE, 0, 8, 2), GridPoint(PointKind.PREFILL, 64)):
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
        """Time of a point in proportion to the measured one of its kind that is nearest in work; 0 without one."""
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
            if self._left_s() <= 0:
                return

    async def _idle(self) -> None:
        while self._is_asked() or time.monotonic() - self._asked_s < _QUIET_S:  # noqa: ASYNC110 - vLLM has no event
            await asyncio.sleep(_POLL_S)

    def _is_asked(self) -> bool:
        """Whether the engine has requests that are not ours."""
        is_asked = self._engine.num_unfinished_requests() > self._in_flight
        if is_asked:
            self._asked_s = time.monotonic()
        return is_asked

    async def _attempt(self, point: GridPoint) -> bool:
        """Run one point; False if it gave way to a request."""
        work = asyncio.create_task(self._run_point(point))
        try:
            while self._plan.is_background and not work.done():
                await asyncio.wait({work}, timeout=_POLL_S)
                if not work.done() and self._is_asked():
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
        elif point.kind in _DECODED_TOKENS:
            await self._together(point, _DECODED_TOKENS[point.kind])
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
        with self._request() as request_id:
            async for ids in self._engine.decode(prompt_ids, request_id, num_tokens, priority=1):
                if started is not None and len(ids) >= 4:
                    started.set()

    @contextlib.contextmanager
    def _request(self) -> Iterator[str]:
        """The id of a new request, which counts as ours meanwhile."""
        self._num_requests += 1
        self._in_flight += 1
        try:
            yield f"{self._prefix}-{self._num_requests}"
        finally:
            self._in_flight -= 1

    async def _run_task(self, point: GridPoint) -> None:
        kind = TaskKind.TRAIN if point.kind is PointKind.TRAIN else TaskKind.EVALUATE
        pairs, num_tokens = self._pairs(point.num_tokens)
        with self._request() as task_id:
            result = await self._engine.run_task(FineTuneTask(task_id, kind, pairs))
        if result.error is not None:  # random tokens may well diverge; the slices before are measured all the same
            logger.info("a measured fine-tune task ended early: %s", result.error)
        elif kind is TaskKind.TRAIN and result.peak_bytes:
            self._result.memory.append((num_tokens, result.peak_bytes))

    def _pairs(self, num_tokens: int) -> tuple[tuple[TokenizedPair, ...], int]:
        """Pairs that make one micro-batch of at most `num_tokens` tokens, padding included, and its true size."""
        width = min(num_tokens // 2, _ROW_TOKENS, self._plan.max_pair_tokens - 1)
        half = width // 2
        lengths = (half, width - half + 1, width - half + 1)
        pair_tokens = PairGroup((lengths,), may_share=self._plan.share_prompt).num_tokens
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


def make_grid(plan: MeasurePlan) -> list[GridPoint]:
    """All points, each kind ordered coarse to fine, the kinds taking turns."""
    room = plan.max_model_len - _LONGEST_DECODE - 1
    lengths = _powers(8, min(room, plan.max_tokens))
    contexts = [0, *_powers(128, room)]
    batches = _powers(1, plan.max_num_seqs)
    sizes = _powers(32, plan.max_slice_tokens)
    families = [
        [GridPoint(PointKind.PREFILL, n, c) for n in lengths for c in contexts if n + c <= room],
        [GridPoint(PointKind.DECODE, 0, c, b) for b in batches for c in (8, *contexts[1:]) if _fits(plan, b, c)],
        [
            GridPoint(PointKind.MIXED, n, 32, b)
            for b in batches
            for n in lengths
            if b < plan.max_num_seqs and n >= 32 and _fits(plan, b, n)
        ],
        [GridPoint(PointKind.EVALUATE, n) for n in sizes],
        [GridPoint(PointKind.TRAIN, n) for n in sizes] if plan.trains else [],
    ]
    return list(_take_turns(coarse_to_fine(family) for family in families if family))


def coarse_to_fine(points: Sequence[GridPoint]) -> list[GridPoint]:
    """The least work first, then always the point that is farthest from all before it (logarithmic axes)."""
    left = sorted(points, key=lambda point: (point.work, point.num_tokens, point.context))
    if not left:
        return []
    ordered = [left.pop(0)]
    distance = [_distance(point, ordered[0]) for point in left]
    while left:
        index = max(range(len(left)), key=distance.__getitem__)
        chosen = left.pop(index)
        distance.pop(index)
        distance = [min(d, _distance(point, chosen)) for d, point in zip(distance, left, strict=True)]
        ordered.append(chosen)
    return ordered


def _fits(plan: MeasurePlan, batch: int, context: int) -> bool:
    """Half of the KV cache at most, so that nothing is preempted."""
    tokens = batch * (context + _LONGEST_DECODE)
    limit = plan.max_model_len if plan.max_kv_tokens is None else plan.max_kv_tokens // 2
    return context + _LONGEST_DECODE < plan.max_model_len and (tokens <= limit or batch == 1)


def _powers(first: int, last: int) -> list[int]:
    """Powers of two times `first` up to `last`, and `last` itself."""
    values = list(itertools.takewhile(lambda value: value <= last, (first << i for i in itertools.count())))
    return values if not values or values[-1] == last else [*values, last]


def _distance(a: GridPoint, b: GridPoint) -> float:
    pairs = ((a.num_tokens, b.num_tokens), (a.context, b.context), (a.batch, b.batch))
    return sum(abs(math.log2(1 + x) - math.log2(1 + y)) for x, y in pairs)


def _take_turns(families: Iterable[list[GridPoint]]) -> Iterable[GridPoint]:
    """The first of each family, then every family spread evenly over the order: all end about together."""
    placed = [
        (index / len(family), number, point)
        for number, family in enumerate(families)
        for index, point in enumerate(family)
    ]
    return [point for _, _, point in sorted(placed, key=lambda entry: entry[:2])]
