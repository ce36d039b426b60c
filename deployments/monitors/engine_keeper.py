"""Brings a dead engine back inside the living replica, whose imports and HTTP application stay.

A death is noticed at once where a request is under way, and within `_LOOK_S` otherwise. Until the engine is back,
whatever needs it is refused at once. An engine that does not come back, or dies again and again, ends the replica:
Serve then makes a new one.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from deployments.monitors.metrics import Meter

logger = logging.getLogger(__name__)

MAX_STARTS = 4
"""As many times in a row the engine is started again; then the replica ends."""
_SOUND_S = 60.0
"""An engine that lived for so long was sound: the next death is the first in a row."""
_PAUSE_S = 1.0
"""Between two starts that fail."""
_LOOK_S = 0.25
_MAX_REQUESTS = 256
"""Ids of requests that are kept of a death."""


class KeptEngine(Protocol):
    """An engine that can be started again: `engine.vllm.engine.HybridEngine`."""

    @property
    def is_dead(self) -> bool:
        """It can serve nothing any more."""

    def has_lost_worker(self) -> bool:
        """It will die, and does not know yet."""

    def lose(self) -> list[str]:
        """Let calls fail that wait for the dead engine; returns the ids of the requests under way."""

    async def end_processes(self) -> str:
        """End what is left of it; returns how it ended."""

    async def restart(self) -> None:
        """Start it anew; raises whatever keeps it from that."""


@dataclass(slots=True)
class EngineDeath:
    """One death of the engine."""

    at_s: float
    """Unix seconds."""
    reason: str
    request_ids: list[str]
    """Requests that were under way, waiting ones too; at most `_MAX_REQUESTS`."""
    away_s: float | None = None
    """Until it was back; None: not yet."""


def end_process(reason: str) -> None:
    """End this process; Serve makes another replica."""
    logger.error("this replica ends: %s", reason)
    os._exit(1)


class EngineKeeper:
    """Keeps one engine alive; `run` for as long as the replica lives."""

    def __init__(
        self,
        engine: KeptEngine,
        on_death: Callable[[], None],
        resume: Callable[[], Awaitable[None]],
        give_up: Callable[[str], None] = end_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up.

        Args:
            engine: is started again when it is dead.
            on_death: called once at each death, before the engine's requests learn of it.
            resume: gives an engine that is back what it must have before it serves.
            give_up: called with the reason when it does not come back.
            clock: monotonic seconds.
        """
        self._engine = engine
        self._on_death = on_death
        self._resume = resume
        self._give_up = give_up
        self._clock = clock
        self._meter = Meter("executor")
        self._died_s: float | None = None
        self._back_s = clock()
        self._num_starts = 0
        self.num_deaths = 0
        self.last_death: EngineDeath | None = None

    def note_death(self) -> None:
        """The engine is dead. Once more while it is away, it is the one that was started: what waits for it fails."""
        request_ids = self._engine.lose()
        if self._died_s is not None:
            return
        self._died_s = self._clock()
        self.num_deaths += 1
        self.last_death = EngineDeath(time.time(), "", request_ids[:_MAX_REQUESTS])
        self._meter.count("engine_deaths")
        self._on_death()

    async def run(self) -> None:
        """Look after the engine, for ever."""
        while True:
            if self._engine.is_dead or self._engine.has_lost_worker():
                self.note_death()
            if self._died_s is not None:
                await self._bring_back(self._died_s)
            await asyncio.sleep(_LOOK_S)

    def to_wire(self) -> dict[str, Any]:
        """State, number of deaths and the last one, as JSON values."""
        return {
            "state": "serving" if self._died_s is None else "restarting",
            "deaths": self.num_deaths,
            "last_death": None if self.last_death is None else asdict(self.last_death),
        }

    async def _bring_back(self, died_s: float) -> None:
        assert self.last_death is not None
        if died_s - self._back_s > _SOUND_S:
            self._num_starts = 0
        while True:
            if self._num_starts >= MAX_STARTS:
                self._give_up(f"the engine was started {MAX_STARTS} times in a row and does not stay")
            self._num_starts += 1
            try:
                reason = await self._engine.end_processes()
                logger.error("the engine died: %s; requests under way: %s", reason, self.last_death.request_ids)
                self.last_death.reason = self.last_death.reason or reason
                await self._engine.restart()
                await self._resume()
                break
            except Exception:  # whatever it is, it is tried again
                logger.exception("the engine does not come back")
                await asyncio.sleep(_PAUSE_S)
        self._died_s, self._back_s = None, self._clock()
        self.last_death.away_s = self._back_s - died_s
        logger.warning("the engine is back after %.1f s", self.last_death.away_s)
