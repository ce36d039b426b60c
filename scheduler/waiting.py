"""The waiting order of requests: dynamic priority by class, then arrival, then sequence number.

All requests of one `priority` value age at one rate, so among them the order of arrival is the order: a sorted
list for each value, and only their heads are compared at the moment of asking.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice
from typing import Generic, TypeVar

from core.config import SchedulerConfig
from scheduler.priority import clamp_user_priority, prefill_base, prefill_rate

T = TypeVar("T")
_Entry = tuple[float, int, str]
"""Arrival, sequence number, request id."""


class _Lane:
    """Requests of one `priority` value, oldest first."""

    __slots__ = ("base", "entries", "rate")

    def __init__(self, base: float, rate: float) -> None:
        self.base = base
        self.rate = rate
        self.entries: list[_Entry] = []

    def key(self, entry: _Entry, now_s: float) -> tuple[float, float, int]:
        """Sorts as the total order does: highest priority, earliest arrival, lowest sequence number first."""
        return (-(self.base + self.rate * max(0.0, now_s - entry[0])), entry[0], entry[1])

    def keyed(self, now_s: float) -> Iterator[tuple[tuple[float, float, int], str]]:
        """Keys and request ids in order."""
        return ((self.key(entry, now_s), entry[2]) for entry in self.entries)


class WaitingQueue(Generic[T]):
    """Requests that wait for their first token. Times are on one clock of the caller's choice."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._lanes: dict[int, _Lane] = {}
        self._where: dict[str, tuple[int, _Entry]] = {}
        self._payloads: dict[str, T] = {}
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._payloads)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._payloads

    def push(self, request_id: str, payload: T, arrived_s: float, user_priority: int = 0) -> None:
        """Add a request, or put it anew. A preempted one keeps its arrival and so comes back to the front."""
        self.remove(request_id)
        lane_key = clamp_user_priority(user_priority)
        lane = self._lanes.get(lane_key)
        if lane is None:
            base, rate = prefill_base(lane_key, self._config), prefill_rate(lane_key, self._config)
            lane = self._lanes[lane_key] = _Lane(base, rate)
        self._sequence += 1
        entry = (arrived_s, self._sequence, request_id)
        insort(lane.entries, entry)
        self._where[request_id] = (lane_key, entry)
        self._payloads[request_id] = payload

    def peek(self, now_s: float) -> T:
        """The request that runs next.

        Raises:
            IndexError: the queue is empty.
        """
        return self._payloads[self._first(now_s)]

    def pop(self, now_s: float) -> T:
        """Take out the request that runs next.

        Raises:
            IndexError: the queue is empty.
        """
        request_id = self._first(now_s)
        payload = self._payloads[request_id]
        self.remove(request_id)
        return payload

    def remove(self, request_id: str) -> T | None:
        """Take out one request; None if it does not wait."""
        where = self._where.pop(request_id, None)
        if where is None:
            return None
        lane_key, entry = where
        entries = self._lanes[lane_key].entries
        del entries[bisect_left(entries, entry)]
        return self._payloads.pop(request_id)

    def head(self, count: int, now_s: float) -> list[T]:
        """The first `count` requests in order."""
        return list(islice(self.iterate(now_s), count))

    def iterate(self, now_s: float) -> Iterator[T]:
        """All requests in order. The queue must not change meanwhile."""
        lanes = [lane for lane in self._lanes.values() if lane.entries]
        if len(lanes) == 1:  # the usual case, and vLLM walks the queue often
            return (self._payloads[entry[2]] for entry in lanes[0].entries)
        merged = heapq.merge(*(lane.keyed(now_s) for lane in lanes))
        return (self._payloads[request_id] for _, request_id in merged)

    def oldest_arrival_s(self) -> float | None:
        """Earliest arrival of any waiting request."""
        return min((lane.entries[0][0] for lane in self._lanes.values() if lane.entries), default=None)

    def _first(self, now_s: float) -> str:
        best: tuple[tuple[float, float, int], str] | None = None
        for lane in self._lanes.values():
            if lane.entries:
                entry = lane.entries[0]
                candidate = (lane.key(entry, now_s), entry[2])
                best = candidate if best is None or candidate < best else best
        if best is None:
            raise IndexError("no request is waiting")
        return best[1]
