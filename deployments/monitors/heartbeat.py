"""Signs of life: a beat to Control while a task runs."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from core.errors import ControlUnavailableError

T = TypeVar("T")
HEARTBEAT_S = 10.0
"""Executors at work say so this often; one that is silent for several of these has died with its leases."""


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
