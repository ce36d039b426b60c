"""A count of the requests that were sent to the engine, which its worker reads between two slices.

EngineCore sees a new request when its iteration is over. The worker must know sooner, to leave out the slices that
are left of the iteration: so the front end counts what it sends in eight bytes of shared memory. They belong to the
front end's process and end with it; the others find them by an address in the environment, which they inherit.
"""

import logging
import mmap
import os
from typing import Any

from engine.vllm.directive import NOTE_KEY, TASK_KEY

logger = logging.getLogger(__name__)

_VARIABLE = "MACE_ARRIVALS"
_BYTES = 8


def count_arrivals(client: Any) -> None:
    """Count each interactive request that a started `AsyncLLM` sends to its engine from now on.

    Call after `offer_count`; fine-tune tasks and notes are no requests, and class `background` can wait.
    """
    send, count = client.engine_core.add_request_async, _COUNTS[os.environ[_VARIABLE]]

    async def counted(request: Any) -> None:
        params = request.sampling_params
        extra = (params.extra_args if params is not None else None) or {}
        if request.priority <= 0 and TASK_KEY not in extra and NOTE_KEY not in extra:
            count[:] = (int.from_bytes(count[:], "little") + 1).to_bytes(_BYTES, "little")
        await send(request)

    client.engine_core.add_request_async = counted


def offer_count() -> None:
    """Make the count of an engine that is about to be started from this process."""
    descriptor = os.memfd_create("mace-arrivals")
    os.ftruncate(descriptor, _BYTES)
    address = f"/proc/{os.getpid()}/fd/{descriptor}"
    _COUNTS[address] = mmap.mmap(descriptor, _BYTES)
    os.environ[_VARIABLE] = address


_COUNTS: dict[str, mmap.mmap] = {}


class ArrivalCount:
    """The count as the processes of an engine read it; stays 0 if there is none to be read."""

    def __init__(self) -> None:
        self._count: mmap.mmap | None = None
        if (address := os.environ.get(_VARIABLE)) is None:
            return
        try:
            descriptor = os.open(address, os.O_RDONLY)
            self._count = mmap.mmap(descriptor, _BYTES, prot=mmap.PROT_READ)
            os.close(descriptor)
        except OSError as error:
            logger.warning("requests wait for all slices of an iteration: %s", error)

    def read(self) -> int:
        """Interactive requests that were sent so far."""
        return 0 if self._count is None else int.from_bytes(self._count[:], "little")
