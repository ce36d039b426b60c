"""Gives free heap memory back to the system, on CPU.

oneDNN's cache of compiled products replaces its entries for as long as shapes are new, and activations of all sizes
come and go between them, so the C library's heap gets holes that it keeps (docs/measurements/memory.md; how many
kernels the cache holds is set by `engine.vllm.compat`). That is no leak, but nothing says where it ends. `malloc_trim`
returns the pages of the holes.
"""

import ctypes
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

_PERIOD_S = 60.0
_LEAST_FREE_BYTES = 64 << 20
_FREE_SHARE = 0.25
"""Share of the used heap that may be free, to be used again without asking the system."""


@dataclass(frozen=True, slots=True)
class HeapUse:
    """Memory that the C library has of the system, in bytes; large blocks of their own are left out."""

    used_bytes: int
    free_bytes: int


class _MallInfo2(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def heap_use() -> HeapUse | None:
    """Use of this process's heap, all arenas; None if the C library does not tell."""
    libc = _libc()
    if libc is None:
        return None
    info = libc.mallinfo2()
    return HeapUse(info.uordblks, info.fordblks)


def _trim() -> None:
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _libc() -> Any:
    try:
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _MallInfo2
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError, TypeError):
        logger.info("the C library has no mallinfo2 and malloc_trim; free heap memory stays with the process")
        return None
    return libc


class HeapTrimmer:
    """Call `tick` between iterations; it looks once a minute. Without glibc 2.33 or later it does nothing."""

    def __init__(
        self,
        read: Callable[[], HeapUse | None] = heap_use,
        trim: Callable[[], object] = _trim,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._trim, self._clock = read, trim, clock
        self._due_s = clock() + _PERIOD_S
        self.num_trims = 0

    def tick(self) -> None:
        """Trim if a minute has passed and much of the heap is free. Takes milliseconds when it does."""
        now_s = self._clock()
        if now_s < self._due_s:
            return
        self._due_s = now_s + _PERIOD_S
        use = self._read()
        if use is not None and use.free_bytes > max(_LEAST_FREE_BYTES, _FREE_SHARE * use.used_bytes):
            self._trim()
            self.num_trims += 1
