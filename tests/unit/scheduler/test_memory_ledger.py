import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LedgerError
from scheduler.memory.ledger import MemoryLedger, Pool


def test_a_reservation_that_does_not_fit_changes_nothing():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=50, tau_mem=1.0)
    assert ledger.reserve("step", Pool.ARENA, 40)
    assert not ledger.reserve("other", Pool.ARENA, 20)
    assert not ledger.reserve("step", Pool.ARENA, 60)
    assert (ledger.held_bytes("step"), ledger.held_bytes("other")) == (40, 0)


def test_tau_limits_the_sum_of_both_pools():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=100, tau_mem=0.75)
    assert ledger.reserve("kv", Pool.KV, 100)
    assert not ledger.reserve("step", Pool.ARENA, 51)
    assert ledger.reserve("step", Pool.ARENA, 50)


def test_facts_may_pass_tau_but_not_the_pool():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=0, tau_mem=0.5)
    ledger.record("kv", Pool.KV, 100)
    assert ledger.free_bytes(Pool.KV) == 0
    with pytest.raises(LedgerError, match="cannot hold 101"):
        ledger.record("kv", Pool.KV, 101)


def test_one_owner_cannot_hold_bytes_of_two_pools():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=100, tau_mem=1.0)
    ledger.reserve("a", Pool.KV, 1)
    with pytest.raises(LedgerError, match="holds"):
        ledger.reserve("a", Pool.ARENA, 1)


def test_a_pool_never_shrinks_below_what_is_held():
    ledger = MemoryLedger(kv_bytes=0, arena_bytes=100, tau_mem=1.0)
    ledger.reserve("step", Pool.ARENA, 60)
    ledger.shrink(Pool.ARENA, 10)
    assert ledger.pool_capacity_bytes(Pool.ARENA) == 60


def test_impossible_capacities_are_refused():
    with pytest.raises(LedgerError, match="tau_mem"):
        MemoryLedger(kv_bytes=1, arena_bytes=1, tau_mem=1.5)


def test_books_that_do_not_balance_are_named():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=100, tau_mem=1.0)
    ledger.reserve("a", Pool.KV, 10)
    ledger._used[Pool.KV] = 5
    with pytest.raises(LedgerError, match="add up to 10, the books say 5"):
        ledger.check_integrity()


operations = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "release", "record", "shrink"]),
        st.sampled_from("abc"),
        st.integers(0, 150),
    )
)


@given(operations, st.floats(0.1, 1.0))
def test_the_books_balance_after_every_operation(steps, tau_mem):
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=100, tau_mem=tau_mem)
    pools = {"a": Pool.KV, "b": Pool.ARENA, "c": Pool.ARENA}
    for name, owner, size in steps:
        before = (ledger.used_bytes, ledger.held_bytes(owner))
        if name == "reserve" and not ledger.reserve(owner, pools[owner], size):
            assert (ledger.used_bytes, ledger.held_bytes(owner)) == before
        elif name == "release":
            assert ledger.release(owner) == before[1]
        elif name == "record":
            try:
                ledger.record(owner, pools[owner], size)
            except LedgerError:
                assert (ledger.used_bytes, ledger.held_bytes(owner)) == before
        elif name == "shrink":
            ledger.shrink(pools[owner], size)
        ledger.check_integrity()
