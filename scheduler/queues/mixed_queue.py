"""The fine-tune queue in roles: a batch takes its share of each, so that urgent pairs do not crowd out replay.

Within a role the order is `P_ft(t) + γ·L_DPO`. What one role cannot fill goes to the highest priorities of the others.
"""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from core.config import SchedulerConfig
from scheduler.queues.task_queue import QueuedTask, TaskQueue

T = TypeVar("T")


class MixedQueue(Generic[T]):
    """One `TaskQueue` for each role. `shares` need not add up to 1; a role with share 0 only fills gaps."""

    def __init__(self, config: SchedulerConfig, shares: Mapping[str, float]) -> None:
        total = sum(shares.values())
        self._config = config
        self._shares = {role: share / total for role, share in shares.items()}
        self._queues: dict[str, TaskQueue[T]] = {role: TaskQueue(config) for role in shares}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __contains__(self, task_id: str) -> bool:
        return any(task_id in queue for queue in self._queues.values())

    def push(self, task: QueuedTask[T], role: str) -> None:
        """Add a task, or replace the one of the same id and role."""
        self._queues[role].push(task)

    def remove(self, task_id: str) -> bool:
        """Take out one task by id; False if it is not queued."""
        return any(queue.remove(task_id) is not None for queue in self._queues.values())

    def pop_batch(self, size: int) -> list[QueuedTask[T]]:
        """Take out up to `size` tasks: each role's share, then whatever has the highest priority."""
        batch: list[QueuedTask[T]] = []
        for role, quota in self._quotas(min(size, len(self))).items():
            for _ in range(quota):
                task = self._queues[role].pop()
                if task is not None:
                    batch.append(task)
        while len(batch) < size and (queue := self._most_urgent()) is not None:
            task = queue.pop()
            assert task is not None  # `_most_urgent` gives queues with a task only
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
        return max(tops, key=lambda pair: pair[1].priority_at(now_s, self._config, pair[0].gamma))[0]
