"""MemoryLedger: KV blocks and the fine-tune arena as one capacity.

Each pool has a hard limit of its own (on a device they are separate allocations); `tau_mem` of their sum is what
packing may fill. A reservation that does not fit changes nothing.
"""

from dataclasses import dataclass
from enum import StrEnum

from core.errors import LedgerError


class Pool(StrEnum):
    """Where bytes come from."""

    KV = "kv"
    ARENA = "arena"


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bytes held by one owner."""

    owner: str
    pool: Pool
    num_bytes: int


class MemoryLedger:
    """Who holds how much. Owners are request ids, task ids, or a name such as `inference`."""

    def __init__(self, *, kv_bytes: int, arena_bytes: int, tau_mem: float) -> None:
        if kv_bytes < 0 or arena_bytes < 0 or not 0 < tau_mem <= 1:
            raise LedgerError(f"impossible capacity: kv {kv_bytes}, arena {arena_bytes}, tau_mem {tau_mem}")
        self._capacity = {Pool.KV: kv_bytes, Pool.ARENA: arena_bytes}
        self._used = {Pool.KV: 0, Pool.ARENA: 0}
        self._tau_mem = tau_mem
        self._reservations: dict[str, Reservation] = {}

    @property
    def capacity_bytes(self) -> int:
        """What packing may fill: `tau_mem` of both pools."""
        return int(self._tau_mem * sum(self._capacity.values()))

    @property
    def used_bytes(self) -> int:
        """Reserved bytes of both pools."""
        return sum(self._used.values())

    def pool_capacity_bytes(self, pool: Pool) -> int:
        """The pool's hard limit."""
        return self._capacity[pool]

    def pool_used_bytes(self, pool: Pool) -> int:
        """Reserved bytes of one pool."""
        return self._used[pool]

    def free_bytes(self, pool: Pool) -> int:
        """What a new reservation in the pool may take."""
        in_pool = self._capacity[pool] - self._used[pool]
        return max(0, min(in_pool, self.capacity_bytes - self.used_bytes))

    def held_bytes(self, owner: str) -> int:
        """What the owner has reserved; 0 if nothing."""
        held = self._reservations.get(owner)
        return 0 if held is None else held.num_bytes

    def reserve(self, owner: str, pool: Pool, num_bytes: int) -> bool:
        """Set the owner's reservation to `num_bytes`. False, with nothing changed, if that does not fit.

        Raises:
            LedgerError: negative bytes, or the owner holds bytes of another pool.
        """
        held = self._reservations.get(owner)
        if num_bytes < 0 or (held is not None and held.pool is not pool):
            raise LedgerError(f"cannot reserve {num_bytes} bytes of {pool} for {owner!r}, which holds {held}")
        growth = num_bytes - (0 if held is None else held.num_bytes)
        if growth > self.free_bytes(pool):
            return False
        self._set(owner, pool, num_bytes, growth)
        return True

    def release(self, owner: str) -> int:
        """Give back all that the owner holds; returns how much. Unknown owners hold nothing."""
        held = self._reservations.pop(owner, None)
        if held is None:
            return 0
        self._used[held.pool] -= held.num_bytes
        return held.num_bytes

    def record(self, owner: str, pool: Pool, num_bytes: int) -> None:
        """Enter a fact: what vLLM's pool really holds. Unlike `reserve` it may pass `tau_mem`, not the pool.

        Raises:
            LedgerError: beyond the pool's hard limit, or negative.
        """
        held = self._reservations.get(owner)
        growth = num_bytes - (0 if held is None else held.num_bytes)
        if num_bytes < 0 or self._used[pool] + growth > self._capacity[pool]:
            raise LedgerError(f"{owner!r} cannot hold {num_bytes} bytes of {pool}: {self._capacity[pool]} in all")
        self._set(owner, pool, num_bytes, growth)

    def set_capacity(self, pool: Pool, num_bytes: int) -> None:
        """Set a pool's hard limit, as soon as it is known; never below what is reserved."""
        self._capacity[pool] = max(self._used[pool], num_bytes)

    def shrink(self, pool: Pool, num_bytes: int) -> None:
        """Learn that a pool is smaller than thought (an allocation failed); never below what is reserved."""
        self.set_capacity(pool, min(self._capacity[pool], num_bytes))

    def check_integrity(self) -> None:
        """Verify that the books balance.

        Raises:
            LedgerError: naming what does not.
        """
        for pool in Pool:
            total = sum(r.num_bytes for r in self._reservations.values() if r.pool is pool)
            if total != self._used[pool]:
                raise LedgerError(f"{pool}: reservations add up to {total}, the books say {self._used[pool]}")
            if not 0 <= total <= self._capacity[pool]:
                raise LedgerError(f"{pool}: {total} bytes reserved of {self._capacity[pool]}")

    def _set(self, owner: str, pool: Pool, num_bytes: int, growth: int) -> None:
        self._used[pool] += growth
        if num_bytes:
            self._reservations[owner] = Reservation(owner, pool, num_bytes)
        else:
            self._reservations.pop(owner, None)
