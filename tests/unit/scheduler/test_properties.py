"""Invariants of the planner under any order of arrivals, tasks, slow iterations and out-of-memory."""

import itertools
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scheduler.iteration.prefill import MIN_PREFILL_TOKENS
from scheduler.memory.ledger import Pool
from tests.support.known_device import STARVATION_BOUND_S, KnownDevice
from tests.support.known_device import settings as settings_of
from tests.support.mini_engine import MiniEngine, Request


class PlannedEngine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(["mace", "mace", "mace", "inference_only", "periodic", "continuous"]),
        packing=st.sampled_from(["best_fit", "first_fit"]),
        base_s=st.sampled_from([0.001, 0.02, 0.09]),
        overhead_s=st.sampled_from([0.001, 0.02]),
        upper=st.sampled_from([1.0, 1.3]),
    )
    def start(self, policy, packing, base_s, overhead_s, upper):
        args = settings_of(policy=policy, packing=packing, retrain_rate=0.5, period_requests=4)
        self.engine = MiniEngine(args, KnownDevice(base_s=base_s, overhead_s=overhead_s, upper=upper))
        self.arrived = {}
        self.tasks = {}
        self.names = itertools.count()

    @rule(num_prompt=st.integers(1, 900), num_output=st.integers(1, 20), user_priority=st.integers(-2, 2))
    def arrive(self, num_prompt, num_output, user_priority):
        request = Request(f"r{next(self.names)}", 0.0, num_prompt, num_output, user_priority)
        self.arrived[request.request_id] = request
        self.engine.arrive(request)

    @rule(num_slices=st.integers(1, 12))
    def add_task(self, num_slices):
        name = f"t{next(self.names)}"
        self.tasks[name] = num_slices
        self.engine.add_task(name, num_slices)

    @rule(count=st.integers(1, 30), noise=st.floats(0.5, 3.0), out_of_memory=st.booleans())
    def iterate(self, count, noise, out_of_memory):
        for _ in range(count):
            self.check_budget(*self.engine.iterate(noise, out_of_memory))

    def check_budget(self, view, plan, shape, slices):
        engine = self.engine
        config, device = engine.args.scheduler, engine.device
        assert shape.num_tokens <= max(plan.token_budget, 0)
        if plan.is_blocking:
            assert shape.num_tokens == 0
            return
        if config.policy != "mace":
            assert not slices
        assert shape.num_decode == view.num_decode  # prompts never take a running request's token
        self.check_seats(view, plan)
        capacity_s = (
            0.8 * 0.1 if view.num_decode else 0.8 * 0.5
        )  # slack_fraction of TBT, or of half the TTFT target
        forward_s = device.upper * device.forward_s(shape)
        # Over capacity only by what must go on whatever it takes: decoding, one smallest chunk, one aged slice.
        if shape.num_prefill_tokens > MIN_PREFILL_TOKENS:
            assert forward_s + device.overhead_s <= capacity_s + 1e-9
        if len(slices) > plan.min_slices:
            spent_s = sum(s.latency_s for s in slices)
            assert spent_s <= plan.finetune_budget_s + 1e-9
            if shape.num_tokens:
                assert forward_s + device.overhead_s + spent_s <= capacity_s + 1e-9

    def check_seats(self, view, plan):
        """Nothing is planned for requests that cannot start."""
        startable = [p.num_tokens for p in view.prefills if p.is_running]
        startable += [p.num_tokens for p in view.prefills if not p.is_running][: view.free_seats]
        if view.prefills:
            assert plan.token_budget <= view.num_decode + max(sum(startable), MIN_PREFILL_TOKENS)

    @invariant()
    def nobody_holds_memory_without_work(self):
        if hasattr(self, "engine") and not self.engine.tasks:
            assert self.engine.planner.memory.pool_used_bytes(Pool.ARENA) == 0

    @invariant()
    def the_books_balance(self):
        if hasattr(self, "engine"):
            memory = self.engine.planner.memory
            memory.check_integrity()
            assert memory.pool_used_bytes(Pool.KV) <= memory.pool_capacity_bytes(Pool.KV)

    @invariant()
    def nothing_is_lost_or_run_twice(self):
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        places = [
            *(r.request_id for r in engine.waiting.iterate(engine.now_s)),
            *(r.request_id for r in engine.running),
            *engine.finished,
        ]
        assert sorted(places) == sorted(self.arrived)
        for name, num_slices in self.tasks.items():
            assert engine.slices_run[name] + engine.tasks.get(name, 0) == num_slices

    @invariant()
    def training_does_not_starve(self):
        if hasattr(self, "engine") and self.engine.args.scheduler.policy == "mace":
            engine = self.engine
            longest_s = 3.0 * (engine.device.base_s + 600 * engine.device.token_s) + 1.0
            assert engine.longest_starvation_s <= STARVATION_BOUND_S + longest_s

    def teardown(self):
        """Whatever happened, the engine ends with everything served and, if it trains at all, trained."""
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        for _ in range(4_000):
            if not (len(engine.waiting) or engine.running):
                break
            engine.iterate()
        assert sorted(engine.finished) == sorted(self.arrived)
        if engine.args.scheduler.policy == "mace":
            for _ in range(2_000):
                if not engine.tasks:
                    break
                engine.iterate()
            assert not engine.tasks


PlannedEngine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestPlannedEngine = PlannedEngine.TestCase


def saturated(args, seconds):
    """More decoding than the TBT target allows, for ever, and one task."""
    engine = MiniEngine(args, KnownDevice(base_s=0.2), kv_tokens=10**6)
    engine.arrive(Request("endless", 0.0, 1, 10**9))
    engine.iterate()
    engine.add_task("t", 3)
    while engine.now_s < seconds:
        engine.iterate()
    return engine


def test_under_saturation_a_slice_runs_within_the_stated_bound():
    engine = saturated(settings_of(), 2.2 * STARVATION_BOUND_S)
    assert engine.slices_run["t"] == 2
    assert engine.longest_starvation_s <= STARVATION_BOUND_S + 0.5


def test_without_ageing_training_may_starve_for_ever():
    assert saturated(settings_of(ageing=False), 200).slices_run["t"] == 0


def trace(seed):
    rng = random.Random(seed)
    engine = MiniEngine(settings_of(), KnownDevice(upper=1.1))
    for i in range(300):
        if rng.random() < 0.3:
            engine.arrive(Request(f"r{i}", 0.0, rng.randint(1, 300), rng.randint(1, 20), rng.choice([0, 0, 1])))
        if rng.random() < 0.1:
            engine.add_task(f"t{i}", rng.randint(1, 20))
        engine.iterate(noise=rng.uniform(0.8, 1.5))
    return "\n".join(engine.log).encode()


def test_the_same_seed_and_trace_give_a_byte_equal_log():
    assert trace(7) == trace(7)
    assert trace(7) != trace(8)
