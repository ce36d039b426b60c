"""Signs of life: a beat to Control while a task runs, and the end of a replica whose engine is dead."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

from core.errors import ControlUnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")
HEARTBEAT_S = 10.0
"""Executors at work say so this often; one that is silent for several of these has died with its leases."""
_HEALTH_INTERVAL_S = 0.5


async def with_heartbeat(
    work: Awaitable[T], beat: Callable[[], Awaitable[None]], interval_s: float = HEARTBEAT_S
) -> T:
    """Wait for `work`, calling `beat` every `interval_s` seconds meanwhile. Cancelling cancels the work."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=interval_s)
            if done:
                return task.result()
            with contextlib.suppress(ControlUnavailableError):
                await beat()
    finally:
        task.cancel()


async def end_with(check_health: Callable[[], Awaitable[None]]) -> NoReturn:
    """End this process as soon as `check_health` raises.

    A replica whose engine is dead answers every request with 500 until Serve notices; one that is gone is replaced at
    once, and Serve keeps new requests for its successor.
    """
    while True:
        try:
            await check_health()
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing can be served any more
            logger.error("the engine is dead, this replica ends: %s: %s", type(error).__name__, error)
            os._exit(1)
        await asyncio.sleep(_HEALTH_INTERVAL_S)
