"""What waits to be scored by the live adapter: first come, first served, and after a failure one by one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Waiting(Generic[T]):
    payload: T
    attempts: int


class ScoringQueue(Generic[T]):
    """Pairs by id. A batch that failed comes back as single pairs, so that one bad pair is found and parked alone."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting[T]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, pair_id: str, payload: T, attempts: int = 0) -> None:
        """Add a pair after `attempts` failures; one that waits already keeps its place."""
        self._waiting.setdefault(pair_id, _Waiting(payload, attempts))

    def pop_batch(self, size: int) -> tuple[list[T], int]:
        """The first up to `size` pairs that failed as often as the first of all, and how often that was.

        Raises:
            StopIteration: the queue is empty.
        """
        attempts = next(iter(self._waiting.values())).attempts
        same = [pair_id for pair_id, waiting in self._waiting.items() if waiting.attempts == attempts]
        taken = same[: 1 if attempts else size]
        return [self._waiting.pop(pair_id).payload for pair_id in taken], attempts

    def discard(self, pair_ids: Iterable[str]) -> None:
        """Forget pairs; unknown ids are ignored."""
        for pair_id in pair_ids:
            self._waiting.pop(pair_id, None)

    def ids(self) -> Iterator[str]:
        """Ids of all pairs, first come first."""
        return iter(self._waiting)
