"""Fine-tune work for a measured engine: a backlog that never empties, or pairs at a fixed rate."""

import asyncio
import contextlib
import itertools
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness.client import Clock, MeasuredEngine
from core.errors import TrainingError
from core.types import FineTuneTask, TaskKind, TokenizedPair
from simulator.trace import FineTune

BACKLOG_TASKS = 2
"""Steps that are submitted at any time: one runs, and the next is there before it ends."""

_POOL_PAIRS = 64
"""Distinct pairs; they repeat, as production repeats pairs, so that the loss stays in bounds however long a run is."""

_ERROR_PAUSE_S = 0.1
"""After a failed step; an engine that refuses every task must not be asked in a tight loop."""


@dataclass(slots=True)
class TaskRecord:
    """One fine-tune step that ended while the client watched, in or after the window."""

    task_id: str
    num_pairs: int
    finished_s: float = 0.0
    busy_s: float = 0.0
    """Device time of its slices."""
    longest_slice_s: float = 0.0
    error: str | None = None


class FineTuneFeeder:
    """Submits DPO steps of random pairs and records how each ends. `start`, then `stop`."""

    def __init__(
        self, engine: MeasuredEngine, load: FineTune, *, pairs_per_step: int, vocab_size: int, seed: int = 0
    ) -> None:
        self._engine = engine
        self._load = load
        self._pairs_per_step = pairs_per_step
        self._pool = random_pairs(load, vocab_size, seed)
        self._numbers = itertools.count()
        self._workers: set[asyncio.Task[None]] = set()
        self._clock = Clock()
        self._has_finished = asyncio.Event()
        self.finished: list[TaskRecord] = []
        """Steps that have ended since `start` or `restart`, failed ones too."""

    def start(self) -> None:
        """Begin to submit."""
        if self._load.pairs_per_s is None:
            for _ in range(BACKLOG_TASKS):
                self._spawn(self._keep_busy())
        elif self._load.pairs_per_s > 0:
            self._spawn(self._at_rate(self._load.pairs_per_s))

    def restart(self, clock: Clock) -> None:
        """Forget the steps that have ended, and date those that follow by another clock."""
        self._clock = clock
        self.finished.clear()

    async def stop(self) -> None:
        """Abort what is submitted. Steps that were cut off leave no record."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def wait_for_one(self, limit_s: float) -> bool:
        """Wait until a step has ended, or for `limit_s`; return whether one has, or none will ever come.

        Raises:
            TrainingError: the first step failed.
        """
        if not self._workers:
            return True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_finished.wait(), limit_s)
        if self.finished and self.finished[0].error is not None:
            raise TrainingError(f"the first fine-tune step failed: {self.finished[0].error}")
        return bool(self.finished)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._workers.add(task)
        task.add_done_callback(self._workers.discard)

    async def _keep_busy(self) -> None:
        while True:
            await self._run_step()

    async def _at_rate(self, pairs_per_s: float) -> None:
        """A step is submitted when its last pair has arrived, whether or not earlier ones are done."""
        clock = Clock()  # of its own, which a restart does not move
        for number in itertools.count(1):
            await clock.sleep_until(number * self._pairs_per_step / pairs_per_s)
            self._spawn(self._run_step())

    async def _run_step(self) -> None:
        number = next(self._numbers)
        first = number * self._pairs_per_step
        pairs = tuple(self._pool[(first + i) % len(self._pool)] for i in range(self._pairs_per_step))
        record = TaskRecord(f"bench-{number}", len(pairs))
        try:
            result = await self._engine.run_task(FineTuneTask(record.task_id, TaskKind.TRAIN, pairs))
            record.busy_s, record.longest_slice_s = result.busy_s, result.longest_slice_s
            record.error = result.error
        except Exception as error:  # noqa: BLE001 - a failed step is a result of the measurement
            record.error = f"{type(error).__name__}: {error}"
        record.finished_s = self._clock()
        self.finished.append(record)
        self._has_finished.set()
        if record.error is not None:
            await asyncio.sleep(_ERROR_PAUSE_S)


def random_pairs(load: FineTune, vocab_size: int, seed: int) -> list[TokenizedPair]:
    """The pool of distinct pairs, all of the trace's lengths."""
    rng = np.random.default_rng([seed, 1])

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size, count).tolist())

    prompt, answer = load.prompt_tokens, load.completion_tokens
    return [TokenizedPair(f"pair-{i}", ids(prompt), ids(answer), ids(answer)) for i in range(_POOL_PAIRS)]
