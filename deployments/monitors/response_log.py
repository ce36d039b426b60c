"""Responses on their way to the response store: kept in memory until Control has committed them.

Requests never wait for it. Feedback does: `flush` first, so that an id that a client has just received is known.
While Control is away, a bounded number is kept; the oldest are dropped first, and counted.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any

from alignment.records.pairs import StoredResponse
from core.errors import MaceError
from deployments.monitors.metrics import Meter

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.5
_PAUSE_S = 2.0
"""Further pause after a failed commit."""
_MAX_WAITING = 10_000
_AT_ONCE = 500


class ResponseLog:
    """Bounded buffer in front of the response store; `put` commits a list of them there, or raises a MaceError."""

    def __init__(self, put: Callable[[list[Any]], Awaitable[int]]) -> None:
        self._put = put
        self._waiting: deque[StoredResponse] = deque()
        self._flushing = asyncio.Lock()
        self._has_some = asyncio.Event()
        self._meter = Meter("executor")

    def add(self, response: StoredResponse) -> None:
        """Take one response; never blocks."""
        self._waiting.append(response)
        self._has_some.set()
        while len(self._waiting) > _MAX_WAITING:
            self._waiting.popleft()
            self._meter.count("responses_dropped")

    async def flush(self) -> None:
        """Commit everything that waits.

        Raises:
            ControlUnavailableError, StoreUnavailableError: not now; nothing was lost.
        """
        async with self._flushing:
            while self._waiting:
                some = list(islice(self._waiting, _AT_ONCE))
                await self._put(some)
                for response in some:
                    if self._waiting and self._waiting[0] is response:  # else dropped meanwhile
                        self._waiting.popleft()

    async def run(self) -> None:
        """Flush what has come in, a little later and together, for ever."""
        while True:
            await self._has_some.wait()
            await asyncio.sleep(_INTERVAL_S)
            self._has_some.clear()
            try:
                await self.flush()
            except Exception as error:  # whatever it is must not end the loop: nobody would notice
                logger.warning("responses wait in memory: %s", error, exc_info=not isinstance(error, MaceError))
                self._has_some.set()
                await asyncio.sleep(_PAUSE_S)
