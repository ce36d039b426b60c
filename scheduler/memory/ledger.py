"""MemoryLedger: KV blocks and the fine-tune arena as one capacity.

Inference uses the KV pool, the fine-tune step in progress the arena. Each pool has a hard limit of its own (on a device
they are separate allocations); `tau_mem` of their sum is what packing may fill. A reservation that does not fit changes
nothing. What else lives on the device has an entry: bytes by name, which belong to no pool.
"""

import logging
from collections.abc import Mapping
from enum import StrEnum

from core.errors import LedgerError

logger = logging.getLogger(__name__)

ARENA_SHARE = 0.5
"""Share of the memory left for training that the arena takes, unless a size is set: the predictions of a step are upper
estimates of what it asks for, and an allocator has holes."""


class Pool(StrEnum):
    """The two allocations."""

    KV = "kv"
    ARENA = "arena"


class MemoryLedger:
    """Capacity and use of each pool."""

    def __init__(self, *, kv_bytes: int, arena_bytes: int, tau_mem: float) -> None:
        if kv_bytes < 0 or arena_bytes < 0 or not 0 < tau_mem <= 1:
            raise LedgerError(f"impossible capacity: kv {kv_bytes}, arena {arena_bytes}, tau_mem {tau_mem}")
        self._capacity = {Pool.KV: kv_bytes, Pool.ARENA: arena_bytes}
        self._used = {Pool.KV: 0, Pool.ARENA: 0}
        self._tau_mem = tau_mem
        self.entries: dict[str, int] = {}
        """Bytes of the device that neither pool may use, by what they are for."""

    @property
    def capacity_bytes(self) -> int:
        """The part that packing may fill: `tau_mem` of both pools."""
        return int(self._tau_mem * sum(self._capacity.values()))

    @property
    def used_bytes(self) -> int:
        """Used bytes of both pools."""
        return sum(self._used.values())

    def pool_capacity_bytes(self, pool: Pool) -> int:
        """The pool's hard limit."""
        return self._capacity[pool]

    def pool_used_bytes(self, pool: Pool) -> int:
        """Used bytes of one pool."""
        return self._used[pool]

    def room_bytes(self, pool: Pool) -> int:
        """Most that the pool may use while the other keeps what it has; below zero if that passes the joint limit."""
        return min(self._capacity[pool], self.joint_room_bytes(pool))

    def joint_room_bytes(self, pool: Pool) -> int:
        """The same by the joint limit alone, however large the pool is."""
        return self.capacity_bytes - (self.used_bytes - self._used[pool])

    def reserve(self, pool: Pool, num_bytes: int) -> bool:
        """Set what the pool uses. False, with nothing changed, if it would grow beyond its room."""
        if num_bytes < 0:
            raise LedgerError(f"cannot reserve {num_bytes} bytes of {pool}")
        if num_bytes > self._used[pool] and num_bytes > self.room_bytes(pool):
            return False
        self._used[pool] = num_bytes
        return True

    def record(self, pool: Pool, num_bytes: int) -> None:
        """Enter a fact: what vLLM's pool really holds. Unlike `reserve` it may pass `tau_mem`, not the pool.

        Raises:
            LedgerError: beyond the pool's hard limit, or negative.
        """
        if not 0 <= num_bytes <= self._capacity[pool]:
            raise LedgerError(f"{pool} cannot hold {num_bytes} bytes: {self._capacity[pool]} in all")
        self._used[pool] = num_bytes

    def set_capacity(self, pool: Pool, num_bytes: int) -> None:
        """Set a pool's hard limit, as soon as it is known; never below what is used."""
        self._capacity[pool] = max(self._used[pool], num_bytes)

    def note_device(
        self, free_bytes: int, kept: Mapping[str, int], held: Mapping[str, int], arena_bytes: int | None = None
    ) -> None:
        """Size the arena by what was found on the device, and enter what is beside it.

        Args:
            free_bytes: what could still be allocated.
            kept: bytes of that which others take back for a while: the arena must not have them.
            held: bytes that are taken already.
            arena_bytes: the size that the settings ask for; None: `ARENA_SHARE` of what is left. Never more than is.
        """
        self.entries = {**held, **kept}
        left_bytes = max(0, free_bytes - sum(kept.values()))
        if arena_bytes is not None and arena_bytes > left_bytes:
            logger.warning(
                "training.arena_bytes is %d, but only %d are left on the device", arena_bytes, left_bytes
            )
        wanted = int(ARENA_SHARE * left_bytes) if arena_bytes is None else arena_bytes
        self.set_capacity(Pool.ARENA, min(wanted, left_bytes))

    def check_integrity(self) -> None:
        """Raise LedgerError if a pool uses less than nothing, or more than it has."""
        for pool, used in self._used.items():
            if not 0 <= used <= self._capacity[pool]:
                raise LedgerError(f"{pool}: {used} bytes used of {self._capacity[pool]}")
