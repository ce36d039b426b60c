"""What clients see, measured where answers leave the server: time to first token, gaps, and how many meet the targets.

Gaps are those between chunks of a stream. Parts that leave within `ONE_CHUNK_S` of each other are one chunk: a role and
its first token, the last token and what ends the stream. An answer in one piece has its whole latency only.

The engine's planner is told twice a second while there is traffic (`scheduler.iteration.edge`); without traffic
nothing runs. Memory is bounded, and a chunk costs a few microseconds.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from core.batch import EdgeReport
from core.config import SloConfig
from core.errors import MaceError
from deployments.monitors.metrics import Meter
from scheduler.iteration.edge import upper_quantile
from scheduler.iteration.slo import ROOM

logger = logging.getLogger(__name__)

RequestClass = Literal["interactive", "background"]
"""See `scheduler.priority`."""
CLASSES: tuple[RequestClass, ...] = ("interactive", "background")

REPORT_S = 0.5
"""The planner hears of observations at most this much later."""
ONE_CHUNK_S = 0.5e-3
"""Far less than any engine needs for a token, far more than the server takes between two parts of one."""
_ALL = 0.95
"""Training that does without this share of its time has none to speak of."""
_RECENT = 1024
"""Newest observations whose quantiles are shown."""


@dataclass(slots=True)
class _Series:
    """One objective of one class."""

    observe: Callable[[float], None]
    """Of its histogram."""
    num_seen: int = 0
    num_late: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    num_counted: int = 0
    """Those of `num_seen`, and below of `num_late`, that the counters and the planner have."""
    num_late_counted: int = 0

    def add(self, seconds: float, target_s: float) -> None:
        self.num_seen += 1
        self.num_late += seconds > target_s
        self.recent.append(seconds)
        self.observe(seconds)

    def take(self) -> tuple[int, int]:
        """Observations and misses since the last call."""
        new = self.num_seen - self.num_counted, self.num_late - self.num_late_counted
        self.num_counted, self.num_late_counted = self.num_seen, self.num_late
        return new

    def to_wire(self) -> dict[str, Any] | None:
        """Share within the target since the start, and quantiles of the newest; None without any."""
        if not self.num_seen:
            return None
        quantiles = {f"p{level}_s": upper_quantile(self.recent, level / 100) for level in (50, 90, 99)}
        return {"count": self.num_seen, "attainment": 1 - self.num_late / self.num_seen, **quantiles}


class EdgeMeter:
    """See the module docstring. Every call comes from the event loop that serves."""

    def __init__(self, slo: SloConfig, send: Callable[[EdgeReport], Awaitable[None]]) -> None:
        """Measure against `slo`; `send` takes a report to the planner."""
        self.slo = slo
        self._send = send
        self._meter = Meter("http")
        self._first = self._series("time_to_first_token_seconds")
        self._gaps = self._series("inter_token_latency_seconds")
        whole = "e2e_request_latency_seconds"
        self._whole = {name: self._meter.histogram(whole, request_class=name) for name in CLASSES}
        self._new_gaps: list[float] = []
        self._is_due = False
        self._sending: asyncio.Task[None] | None = None

    def add_first(self, request_class: RequestClass, seconds: float) -> None:
        """Take in a time from a request's arrival to the first token of its stream."""
        self._first[request_class].add(seconds, self.slo.ttft_s)
        self._plan_report()

    def add_whole(self, request_class: RequestClass, seconds: float) -> None:
        """Take in a time from a request's arrival to the end of its answer."""
        self._whole[request_class].observe(seconds)

    def stream(self, request_class: RequestClass, arrived_s: float) -> Callable[[float], None]:
        """Begin a stream; call what is returned with the time of each part that leaves, on the clock of `arrived_s`."""
        last_s, series, new_gaps, slo = 0.0, self._gaps[request_class], self._new_gaps, self.slo

        def note(now_s: float) -> None:
            nonlocal last_s
            before_s, last_s = last_s, now_s
            if not before_s:
                self.add_first(request_class, now_s - arrived_s)
            elif (gap_s := now_s - before_s) >= ONE_CHUNK_S:
                series.add(gap_s, slo.tbt_s)
                new_gaps.append(gap_s)
                if not self._is_due:
                    self._plan_report()

        return note

    def warnings(self, lost_share: float) -> list[str]:
        """Say if the gaps of late are above the target although training does without `lost_share` of its time."""
        recent = [gap for name in CLASSES for gap in self._gaps[name].recent]
        if lost_share < _ALL or (p99_s := upper_quantile(recent)) <= self.slo.tbt_s:
            return []
        return [
            f"clients see gaps of {p99_s:.2g} s (p99), above slo.tbt_s of {self.slo.tbt_s:g} s, although training is "
            f"held back; {ROOM * p99_s:.2g} s would leave room"
        ]

    def to_wire(self) -> dict[str, Any]:
        """What clients saw by class: first tokens (`ttft`) and gaps (`tbt`); None for what nobody asked for yet."""
        return {name: {"ttft": self._first[name].to_wire(), "tbt": self._gaps[name].to_wire()} for name in CLASSES}

    def _series(self, name: str) -> dict[RequestClass, _Series]:
        return {each: _Series(self._meter.histogram(name, request_class=each).observe) for each in CLASSES}

    def _plan_report(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(REPORT_S, self._report)

    def _report(self) -> None:
        self._is_due = False
        firsts = {name: self._count("ttft", name, self._first[name].take()) for name in CLASSES}
        gaps = [self._count("tbt", name, self._gaps[name].take()) for name in CLASSES]
        num_first, num_late_first = firsts["interactive"]  # class `background` is there to wait
        report = EdgeReport(
            num_gaps=sum(seen for seen, _ in gaps),
            num_late_gaps=sum(late for _, late in gaps),
            gap_p99_s=upper_quantile(self._new_gaps),
            num_first=num_first,
            num_late_first=num_late_first,
        )
        self._new_gaps.clear()
        self._sending = asyncio.ensure_future(self._tell(report))

    def _count(self, objective: str, name: RequestClass, new: tuple[int, int]) -> tuple[int, int]:
        seen, late = new
        labels = {"objective": objective, "request_class": name}
        self._meter.count("slo_observations", seen - late, met="true", **labels)
        self._meter.count("slo_observations", late, met="false", **labels)
        return new

    async def _tell(self, report: EdgeReport) -> None:
        try:
            await self._send(report)
        except MaceError as error:  # a dead engine: its own watchers end the replica
            logger.warning("the engine was not told what clients see: %s", error)
