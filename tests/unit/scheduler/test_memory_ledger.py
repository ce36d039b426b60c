import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LedgerError
from scheduler.memory.ledger import MemoryLedger, Pool


def test_a_reservation_that_does_not_fit_changes_nothing():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=50, tau_mem=1.0)
    assert ledger.reserve(Pool.ARENA, 40)
    assert not ledger.reserve(Pool.ARENA, 60)
    assert ledger.pool_used_bytes(Pool.ARENA) == 40
    with pytest.raises(LedgerError, match="cannot reserve -1"):
        ledger.reserve(Pool.ARENA, -1)


def test_tau_limits_the_sum_of_both_pools():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=100, tau_mem=0.75)
    assert ledger.reserve(Pool.KV, 100)
    assert not ledger.reserve(Pool.ARENA, 51)
    assert ledger.reserve(Pool.ARENA, 50)


def test_facts_may_pass_tau_but_not_the_pool():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=0, tau_mem=0.5)
    ledger.record(Pool.KV, 100)
    assert ledger.room_bytes(Pool.KV) == 50
    assert ledger.joint_room_bytes(Pool.ARENA) == -50
    with pytest.raises(LedgerError, match="cannot hold 101"):
        ledger.record(Pool.KV, 101)


def test_what_is_above_the_limit_may_shrink():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=0, tau_mem=0.5)
    ledger.record(Pool.KV, 100)
    assert ledger.reserve(Pool.KV, 90)
    assert not ledger.reserve(Pool.KV, 91)


def test_a_pool_never_shrinks_below_what_is_used():
    ledger = MemoryLedger(kv_bytes=0, arena_bytes=100, tau_mem=1.0)
    ledger.reserve(Pool.ARENA, 60)
    ledger.set_capacity(Pool.ARENA, 10)
    assert ledger.pool_capacity_bytes(Pool.ARENA) == 60


def test_the_arena_is_half_of_what_nobody_takes_back_and_all_else_has_an_entry():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=0, tau_mem=1.0)
    ledger.note_device(1000, {"activations": 300, "graph_pools": 100}, {"trainer": 50, "state_copies": 60})
    assert ledger.pool_capacity_bytes(Pool.ARENA) == 300
    assert ledger.entries == {"activations": 300, "graph_pools": 100, "trainer": 50, "state_copies": 60}


@pytest.mark.parametrize(("asked", "given"), [(500, 500), (600, 600), (601, 600), (5000, 600)])
def test_an_arena_that_is_asked_for_is_never_more_than_what_is_left(asked, given):
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=asked, tau_mem=1.0)
    ledger.note_device(1000, {"activations": 400}, {}, asked)
    assert ledger.pool_capacity_bytes(Pool.ARENA) == given


def test_where_forward_passes_need_all_that_is_free_there_is_no_arena():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=0, tau_mem=1.0)
    ledger.note_device(1000, {"activations": 1001}, {})
    assert ledger.pool_capacity_bytes(Pool.ARENA) == 0


def test_impossible_capacities_are_refused():
    with pytest.raises(LedgerError, match="tau_mem"):
        MemoryLedger(kv_bytes=1, arena_bytes=1, tau_mem=1.5)


def test_books_that_are_wrong_are_named():
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=100, tau_mem=1.0)
    ledger.reserve(Pool.KV, math.nan)  # no comparison refuses it
    with pytest.raises(LedgerError, match="nan bytes used of 100"):
        ledger.check_integrity()


operations = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "release", "record", "shrink"]),
        st.sampled_from(list(Pool)),
        st.integers(0, 150),
    )
)


@given(operations, st.floats(0.1, 1.0))
def test_the_books_are_right_after_every_operation(steps, tau_mem):
    ledger = MemoryLedger(kv_bytes=100, arena_bytes=100, tau_mem=tau_mem)
    for name, pool, size in steps:
        before = (ledger.used_bytes, ledger.pool_used_bytes(pool))
        if name == "reserve" and not ledger.reserve(pool, size):
            assert (ledger.used_bytes, ledger.pool_used_bytes(pool)) == before
        elif name == "release":
            ledger.record(Pool.ARENA, 0)
            assert ledger.used_bytes == ledger.pool_used_bytes(Pool.KV)
        elif name == "record":
            try:
                ledger.record(pool, size)
            except LedgerError:
                assert (ledger.used_bytes, ledger.pool_used_bytes(pool)) == before
        elif name == "shrink":
            ledger.set_capacity(pool, min(ledger.pool_capacity_bytes(pool), size))
        ledger.check_integrity()
