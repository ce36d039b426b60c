"""Virtual time: events in a total order of (time, kind, sequence number), as in simpy.

Kinds at one instant: what ends comes before what arrives, so that a request that arrives at the end of an iteration
finds the seats which that iteration has freed.
"""

import heapq
from enum import IntEnum


class EventKind(IntEnum):
    """In the order in which events of one instant happen."""

    ITERATION_END = 0
    TASK = 1
    ARRIVAL = 2


Event = tuple[float, int, int, int, int]
"""Time in seconds, kind, sequence number, executor, and the run of that executor which the event belongs to."""


class EventQueue:
    """The pending events. Time never runs backwards."""

    __slots__ = ("_heap", "_sequence", "now_s")

    def __init__(self) -> None:
        self._heap: list[Event] = []
        self._sequence = 0
        self.now_s = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, time_s: float, kind: EventKind, executor: int = 0, run: int = 0) -> None:
        """Schedule an event, not before now.

        Raises:
            ValueError: `time_s` is in the past or not a number.
        """
        if not time_s >= self.now_s:
            raise ValueError(f"an event at {time_s} s cannot be scheduled at {self.now_s} s")
        self._sequence += 1
        heapq.heappush(self._heap, (time_s, int(kind), self._sequence, executor, run))

    def next_time_s(self) -> float | None:
        """When the next event happens; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def pop(self) -> Event:
        """Take the next event and move time to it."""
        event = heapq.heappop(self._heap)
        self.now_s = event[0]
        return event
