"""The fine-tune queues: pairs that wait to be trained, and pairs that wait to be scored.

The order of training is (priority, arrival, sequence number). All fine-tune tasks age at one rate, so between two of
them the order of `base + rate·wait + γ·L` never changes: a heap on the value at time zero stays right. γ is one for all
tasks; when it changes, the heap is built anew.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from core.config import ExperimentsConfig
from scheduler.priority import finetune_priority, finetune_rate

T = TypeVar("T")


@dataclass(slots=True)
class QueuedTask(Generic[T]):
    """A task in the queue with what decides its place."""

    task_id: str
    payload: T
    arrived_s: float
    dpo_loss: float | None
    attempts: int = 0

    def priority_at(self, now_s: float, gamma: float, experiments: ExperimentsConfig) -> float:
        """`P(t) + γ·L_DPO` at `now_s`."""
        return finetune_priority(now_s - self.arrived_s, self.dpo_loss, self.attempts, gamma, experiments)


class TaskQueue(Generic[T]):
    """Priority queue with removal by id. Highest priority first."""

    def __init__(self, experiments: ExperimentsConfig, gamma: float) -> None:
        self._experiments = experiments
        self.gamma = gamma
        """Weight of the loss in the order now; changed by `set_gamma`."""
        self._heap: list[tuple[float, float, int, str]] = []
        self._tasks: dict[str, tuple[int, QueuedTask[T]]] = {}
        """Keyed by id; the number tells a task's entry in the heap from older ones."""
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._tasks

    def set_gamma(self, gamma: float) -> None:
        """Order all tasks, queued and to come, with another weight of the loss.

        Linear in the queue's length (20 ms for 10,000 tasks); the same value again costs nothing.
        """
        if gamma == self.gamma:
            return
        self.gamma = gamma
        self._heap = [self._ranked(sequence, task) for sequence, task in self._tasks.values()]
        heapq.heapify(self._heap)

    def push(self, task: QueuedTask[T]) -> None:
        """Add a task, or replace the one of the same id."""
        self._sequence += 1
        self._tasks[task.task_id] = self._sequence, task
        heapq.heappush(self._heap, self._ranked(self._sequence, task))

    def remove(self, task_id: str) -> bool:
        """Take out one task by id; False if it is not queued."""
        return self._tasks.pop(task_id, None) is not None

    def peek(self) -> QueuedTask[T] | None:
        """The task that would be popped next."""
        while self._heap:
            _, _, sequence, task_id = self._heap[0]
            found = self._tasks.get(task_id)
            if found is not None and found[0] == sequence:
                return found[1]
            heapq.heappop(self._heap)  # removed or replaced
        return None

    def pop(self) -> QueuedTask[T] | None:
        """Take out the task of highest priority."""
        task = self.peek()
        if task is not None:
            heapq.heappop(self._heap)
            del self._tasks[task.task_id]
        return task

    def ids(self) -> Iterator[str]:
        """Ids of all queued tasks, in no particular order."""
        return iter(self._tasks)

    def _ranked(self, sequence: int, task: QueuedTask[T]) -> tuple[float, float, int, str]:
        fresh = task.priority_at(task.arrived_s, self.gamma, self._experiments)
        key = finetune_rate(self._experiments) * task.arrived_s - fresh
        return key, task.arrived_s, sequence, task.task_id


class MixedQueue(Generic[T]):
    """One `TaskQueue` for each role: a batch takes its share of each, so that urgent pairs do not crowd out replay.

    What one role cannot fill goes to the highest priorities of the others. `shares` need not add up to 1; a role with
    share 0 only fills gaps.
    """

    def __init__(self, experiments: ExperimentsConfig, gamma: float, shares: Mapping[str, float]) -> None:
        total = sum(shares.values())
        self._experiments = experiments
        self._shares = {role: share / total for role, share in shares.items()}
        self._queues: dict[str, TaskQueue[T]] = {role: TaskQueue(experiments, gamma) for role in shares}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __contains__(self, task_id: str) -> bool:
        return any(task_id in queue for queue in self._queues.values())

    def push(self, task: QueuedTask[T], role: str) -> None:
        """Add a task, or replace the one of the same id and role."""
        self._queues[role].push(task)

    def remove(self, task_id: str) -> bool:
        """Take out one task by id; False if it is not queued."""
        return any(queue.remove(task_id) for queue in self._queues.values())

    def pop_batch(self, size: int) -> list[QueuedTask[T]]:
        """Take out up to `size` tasks: each role's share, then whatever has the highest priority."""
        size = min(size, len(self))
        quotas = self._quotas(size)
        batch = [task for role in quotas for _ in range(quotas[role]) if (task := self._queues[role].pop())]
        while len(batch) < size and (queue := self._most_urgent()) and (task := queue.pop()):
            batch.append(task)
        return batch

    def peek(self) -> QueuedTask[T] | None:
        """The task of highest priority."""
        queue = self._most_urgent()
        return None if queue is None else queue.peek()

    def ids(self) -> Iterator[str]:
        """Ids of all tasks, in no order."""
        for queue in self._queues.values():
            yield from queue.ids()

    def lengths(self) -> dict[str, int]:
        """Tasks by role."""
        return {role: len(queue) for role, queue in self._queues.items()}

    def set_gamma(self, gamma: float) -> None:
        """Weight of the loss in the priority from now on, for what is queued too."""
        for queue in self._queues.values():
            queue.set_gamma(gamma)

    def _quotas(self, size: int) -> dict[str, int]:
        """`size` slots by share, remainders to the largest fractions (Hamilton's method)."""
        exact = {role: share * size for role, share in self._shares.items()}
        quotas = {role: int(value) for role, value in exact.items()}
        by_fraction = sorted(exact, key=lambda role: quotas[role] - exact[role])
        for role in by_fraction[: size - sum(quotas.values())]:
            quotas[role] += 1
        return quotas

    def _most_urgent(self) -> TaskQueue[T] | None:
        """The queue whose first task has the highest priority; all age at one rate, so time does not matter."""
        tops = [(queue, top) for queue in self._queues.values() if (top := queue.peek()) is not None]
        if not tops:
            return None
        now_s = max(top.arrived_s for _, top in tops)
        return max(tops, key=lambda pair: pair[1].priority_at(now_s, pair[0].gamma, self._experiments))[0]


class ScoringQueue(Generic[T]):
    """Pairs that the live adapter has not scored, by id: first come, first served.

    A batch that failed comes back as single pairs, so that one bad pair is found and parked alone.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[T, int]] = {}
        """Payload, and how often it failed."""

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, pair_id: str, payload: T, attempts: int = 0) -> None:
        """Add a pair after `attempts` failures; one that waits already keeps its place."""
        self._waiting.setdefault(pair_id, (payload, attempts))

    def pop_batch(self, size: int) -> tuple[list[T], int]:
        """The first pairs, up to `size`, that failed as often as the first of all, and how often that was."""
        _, first_attempts = next(iter(self._waiting.values()))
        same = [pair_id for pair_id, (_, attempts) in self._waiting.items() if attempts == first_attempts]
        taken = same[: 1 if first_attempts else size]
        return [self._waiting.pop(pair_id)[0] for pair_id in taken], first_attempts

    def ids(self) -> Iterator[str]:
        """Ids of all pairs, first come first."""
        return iter(self._waiting)
