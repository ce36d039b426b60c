"""What gives way when memory is short, under any order of arrivals, tasks and slow iterations."""

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.config import KvPruningConfig
from scheduler.memory.ledger import Pool
from scheduler.view import PruneOffer
from tests.support.known_device import KnownDevice
from tests.support.known_device import settings as settings_of
from tests.support.mini_engine import KV_BYTES_PER_TOKEN, MiniEngine, Request

NO_OFFER = PruneOffer(())


class PressedEngine(RuleBasedStateMachine):
    @initialize(
        start=st.sampled_from(["off", "memory_pressure", "memory_pressure", "always"]),
        block_tokens=st.sampled_from([1, 4, 16]),
        kv_tokens=st.sampled_from([320, 480, 900]),
        arena_tokens=st.sampled_from([64, 300]),
        max_fraction=st.sampled_from([0.1, 0.5, 0.9]),
        packing=st.sampled_from(["best_fit", "best_fit", "first_fit"]),
    )
    def begin(self, start, block_tokens, kv_tokens, arena_tokens, max_fraction, packing):
        self.engine = MiniEngine(
            settings_of(
                packing=packing,
                pruning=KvPruningConfig(start=start, max_fraction=max_fraction, recent_tokens=8),
            ),
            KnownDevice(base_s=0.005, token_s=0.0002),
            seats=6,
            kv_tokens=kv_tokens,
            arena_tokens=arena_tokens,
            block_tokens=block_tokens,
        )
        self.names = itertools.count()
        self.arrived = 0
        self.arena_bytes = 0

    @rule(num_prompt=st.integers(1, 200), num_output=st.integers(1, 80))
    def arrive(self, num_prompt, num_output):
        self.engine.arrive(Request(f"r{next(self.names)}", 0.0, num_prompt, num_output))
        self.arrived += 1

    @rule(num_slices=st.integers(1, 12))
    def add_task(self, num_slices):
        self.engine.add_task(f"t{next(self.names)}", num_slices)

    @rule(count=st.integers(1, 40))
    def iterate(self, count):
        for _ in range(count):
            self.check(*self.engine.iterate())

    def check(self, view, plan, shape, slices):
        engine, offer = self.engine, view.prune_offer or NO_OFFER
        left = offer.num_blocks - plan.prune_blocks
        assert left >= 0
        assert bool(plan.prune_blocks) == bool(plan.prune_reason)
        if engine.preempted:  # the last resort
            assert left == 0
        lack = view.decode_blocks - view.free_kv_blocks
        if lack > 0:
            assert plan.prune_blocks >= min(lack, offer.num_blocks)
            reason = "always" if engine.pruning.start == "always" else "decode"
            assert plan.prune_reason == (reason if offer.num_blocks else "")
        if lack > offer.num_blocks and shape.num_tokens:  # training gives way before a request
            assert plan.defers_training
            assert len(slices) <= plan.min_slices
        if plan.prune_reason == "finetune" and engine.tasks:  # else the step has ended, and holds nothing
            self.check_slices_were_short(view, plan)
        memory = engine.planner.memory
        arena_bytes = memory.pool_used_bytes(Pool.ARENA)
        if memory.used_bytes > memory.capacity_bytes and not plan.min_slices and shape.num_tokens:
            assert arena_bytes <= self.arena_bytes  # the KV cache has grown; only work that has aged may pass it
        self.arena_bytes = arena_bytes

    def check_slices_were_short(self, view, plan):
        """What was dropped for slices is what the joint budget lacked, not more."""
        memory = self.engine.planner.memory
        assert memory.used_bytes <= memory.capacity_bytes
        assert memory.used_bytes + view.block_tokens * KV_BYTES_PER_TOKEN >= memory.capacity_bytes
        assert view.decode_blocks <= view.free_kv_blocks

    @invariant()
    def nothing_is_over_capacity(self):
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.planner.memory.check_integrity()
        assert 0 <= engine.used_blocks() <= engine.kv_blocks
        for r in engine.running:
            assert r.dropped <= engine.pruning.max_fraction * (r.computed // engine.block_tokens)
            assert not (r.dropped and engine.pruning.start == "off")
        memory = engine.planner.memory
        assert memory.pool_used_bytes(Pool.ARENA) <= memory.pool_capacity_bytes(Pool.ARENA)

    def teardown(self):
        """Whatever gave way, everybody is served in the end."""
        if not hasattr(self, "engine"):
            return
        for _ in range(6_000):
            if not (len(self.engine.waiting) or self.engine.running):
                break
            self.check(*self.engine.iterate())
        assert len(self.engine.finished) == self.arrived


PressedEngine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestPressedEngine = PressedEngine.TestCase


def crowd(start, seed_tokens=150):
    """Six requests that outgrow the KV cache together."""
    engine = MiniEngine(
        settings_of(pruning=KvPruningConfig(start=start, max_fraction=0.4, recent_tokens=32)),
        KnownDevice(base_s=0.005, token_s=0.0001),
        seats=6,
        kv_tokens=1000,
        block_tokens=16,
        sink_tokens=16,
    )
    for i in range(6):
        engine.arrive(Request(f"r{i}", 0.0, seed_tokens, 60))
    return engine


def test_pruning_keeps_the_seats_that_preemption_would_take():
    preempted = {}
    for start in ("off", "memory_pressure"):
        engine, preempted[start] = crowd(start), 0
        for _ in range(2000):
            engine.iterate()
            preempted[start] += len(engine.preempted)
        assert len(engine.finished) == 6
    assert preempted["off"] > 0
    assert preempted["memory_pressure"] == 0


def test_the_same_pressure_gives_a_byte_equal_log():
    logs = []
    for _ in range(2):
        engine = crowd("memory_pressure")
        engine.add_task("t", 20)
        for _ in range(300):
            engine.iterate()
        logs.append("\n".join(engine.log).encode())
    assert logs[0] == logs[1]
    assert b"prune_reason='decode'" in logs[0] or b"prune_reason='prefill'" in logs[0]
