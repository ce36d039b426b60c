"""KV blocks, preemption and pruning in simulated executors."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.cluster import Simulation
from simulator.executor import Options
from simulator.running import KvBlocks
from tests.support.simulated_device import make_hardware, make_trace


def simulate(start, *, kv_tokens=4000, block_tokens=16, max_fraction=0.25, seed=0, num_requests=150, **options):
    pruning = {"start": start, "max_fraction": max_fraction, "recent_tokens": 32}
    trace = make_trace(
        num_requests=num_requests,
        seed=seed,
        arrivals={"rate_per_s": 8},
        prompt_tokens={"kind": "uniform", "low": 50, "high": 500},
        output_tokens={"kind": "uniform", "low": 10, "high": 200},
        args={"slo": {"ttft_s": 1.0, "tbt_s": 0.1}, "kv_pruning": pruning},
    )
    log: list[str] = []
    hardware = replace(make_hardware(kv_tokens=kv_tokens), block_tokens=block_tokens)
    simulation = Simulation(trace, hardware, Options(**options), write_log=log.append)
    watch(simulation.executors[0], max_fraction)
    return simulation.run(), "".join(log)


def watch(executor, max_fraction):
    """Check the books, and that nobody is preempted while there is more on offer, in every iteration."""
    requests, planner = executor.requests, executor.planner
    plan, fill = planner.plan, requests.fill
    left: list[int] = []

    def checked_plan(view):
        requests.running.check_integrity()
        planner.memory.check_integrity()
        assert view.decode_blocks == requests.running.decode_blocks
        planned = plan(view)
        offered = 0 if view.prune_offer is None else view.prune_offer.num_blocks
        left[:] = [offered - planned.prune_blocks]
        return planned

    def checked_fill(planned, now_s):
        filled = fill(planned, now_s)
        assert left[0] == 0 or not filled.preempted
        for r in requests.running.decodes:
            full = requests.running.cached_tokens(r) // requests.running.blocks.block_tokens
            assert r.num_dropped <= max_fraction * full
        return filled

    planner.plan, requests.fill = checked_plan, checked_fill


def test_pruning_under_pressure_preempts_less_and_serves_sooner():
    off, _ = simulate("off")
    pressed, log = simulate("memory_pressure")
    assert off.statistics.pruned_blocks == 0
    assert pressed.statistics.pruned_blocks > 100
    assert pressed.statistics.preemptions < off.statistics.preemptions
    assert pressed.ttft.percentile(50) < off.ttft.percentile(50)
    events = [json.loads(line) for line in log.splitlines()]
    pruned = sum(int(e["subject"]) for e in events if e["event"] == "pruned")
    assert pruned == pressed.statistics.pruned_blocks == pressed.to_json()["pruned_blocks"]


def test_with_room_for_all_nothing_is_dropped_unless_it_always_is():
    assert simulate("memory_pressure", kv_tokens=200_000)[0].statistics.pruned_blocks == 0
    assert simulate("always", kv_tokens=200_000)[0].statistics.pruned_blocks > 100


@pytest.mark.parametrize("start", ["off", "memory_pressure", "always"])
def test_the_same_seed_gives_the_same_log_byte_for_byte(start):
    assert simulate(start, num_requests=60)[1] == simulate(start, num_requests=60)[1]


@settings(max_examples=15, deadline=None)
@given(
    start=st.sampled_from(["off", "memory_pressure", "always"]),
    kv_tokens=st.sampled_from([800, 1500, 5000]),
    block_tokens=st.sampled_from([1, 16, 32]),
    max_fraction=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 100),
)
def test_the_books_balance_and_everybody_is_served(start, kv_tokens, block_tokens, max_fraction, seed):
    result, _ = simulate(
        start,
        kv_tokens=kv_tokens,
        block_tokens=block_tokens,
        max_fraction=max_fraction,
        seed=seed,
        num_requests=30,
    )
    assert result.num_finished == 30


def test_stretches_change_nothing_with_blocks_of_many_tokens():
    fast, slow = (simulate("off", fast=fast)[1] for fast in (True, False))
    assert sorted(fast.splitlines()) == sorted(slow.splitlines())


@given(
    block_tokens=st.sampled_from([1, 4, 16]),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    capacity=st.integers(20, 60),
)
def test_blocks_are_taken_in_the_passes_that_begin_one(block_tokens, lengths, capacity):
    blocks = KvBlocks(kv_tokens=capacity * block_tokens, block_tokens=block_tokens)
    for length in lengths:
        blocks.count_decode(length, 7, 1)
    blocks.used = min(capacity, sum(map(blocks.holding, lengths)))
    free = blocks.free
    needs = [sum((length + i) % block_tokens == 0 for length in lengths) for i in range(40)]
    assert [blocks.taken_in(7, i) for i in range(41)] == [sum(needs[:i]) for i in range(41)]
    lasts = next((i for i in range(40) if sum(needs[: i + 1]) > free), 40)
    assert blocks.passes_left(7, 40) == lasts
