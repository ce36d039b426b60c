"""MemoryLedger: KV blocks and the fine-tune arena as one capacity.

Inference uses the KV pool, the fine-tune step in progress the arena. Each pool has a hard limit of its own (on a device
they are separate allocations); `tau_mem` of their sum is what packing may fill. A reservation that does not fit changes
nothing.
"""

from enum import StrEnum

from core.errors import LedgerError


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

    def check_integrity(self) -> None:
        """Raise LedgerError if a pool uses less than nothing, or more than it has."""
        for pool, used in self._used.items():
            if not 0 <= used <= self._capacity[pool]:
                raise LedgerError(f"{pool}: {used} bytes used of {self._capacity[pool]}")
