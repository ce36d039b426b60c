"""Slices and vLLM's queue of two batches: when tokens leave, what a slice budget pays for, and where the time goes.

`-s` prints the lateness of tokens and the overhead of an iteration.
"""

import statistics
import time
from itertools import pairwise

import pytest

from scheduler.iteration.planner import IDLE_QUANTUM_S
from tests.support.async_scheduler import async_config
from tests.support.clock import Clock
from tests.support.gpu_engine import FORWARD_S, LAUNCH_S, SLICE_S, SLICES_PER_STEP, GpuEngine

BUDGET_S = 0.040
YIELD_S = 0.001
"""EngineCore sleeps so long after a round that launched no pass."""
SLO = {"ttft_s": 1.0, "tbt_s": (BUDGET_S + FORWARD_S + 3e-3) / 0.8}
SETTLED = 80
"""Passes after which the upper estimate of a pass has forgotten its first guess."""


@pytest.fixture
def make_engine(tiny_assistant, monkeypatch):
    def make(clock=None, **sections):
        with async_config(tiny_assistant, **{"slo": SLO, **sections}) as config:
            assert config.max_concurrent_batches == 2
            return GpuEngine(config, clock or Clock(1000.0), monkeypatch)

    return make


def add_tasks(engine, count=200):
    for number in range(count):
        engine.add_task(f"step-{number}")


def num_slices(engine):
    return sum(len(sample[3]) for sample in engine.iterations())


def overlapping(passes):
    """How many passes were launched while the one before was on the device."""
    return sum(later.launched_s < earlier.ready_s for earlier, later in pairwise(passes))


@pytest.mark.parametrize("clock", [Clock(1000.0), time], ids=["virtual", "real"])
def test_a_token_leaves_as_soon_as_it_exists_while_slices_fill_the_budget(make_engine, clock):
    engine = make_engine(clock)
    add_tasks(engine)
    engine.add("chat", max_tokens=SETTLED + 20)
    engine.run(lambda: "chat" in engine.ended_s)
    settled = engine.passes[SETTLED:]
    late_s = statistics.median(one.late_s for one in settled)
    slices_s = statistics.median(len(sample[3]) for sample in engine.iterations()[-15:-5]) * SLICE_S
    print(f"\na token leaves {1e3 * late_s:.2f} ms after it exists; slices take {1e3 * slices_s:.0f} ms")  # noqa: T201
    assert engine.num_tokens["chat"] == SETTLED + 20
    assert slices_s > BUDGET_S / 2
    assert late_s < slices_s / 4
    if clock is not time:
        assert slices_s > BUDGET_S - 2 * SLICE_S
        assert max(one.late_s for one in engine.passes) < 1e-9


def test_iterations_account_for_all_of_the_time_with_and_without_slices(make_engine):
    engine = make_engine()
    planner, samples = engine.scheduler.planner, []
    observe = planner.observe
    planner.observe = lambda sample: (samples.append(sample), observe(sample))
    engine.add("chat", max_tokens=220)
    engine.run(lambda: len(engine.passes) == SETTLED)
    samples.clear()
    num_before = sum(one.left_s is not None for one in engine.passes)
    for number in range(20):
        engine.add_task(f"step-{number}")
        num_passes = len(engine.passes)
        engine.run(lambda num_passes=num_passes: len(engine.passes) == num_passes + 5)
    assert len(samples) == sum(one.left_s is not None for one in engine.passes) - num_before
    wall_s = engine.passes[num_before + len(samples) - 1].left_s - engine.passes[num_before - 1].left_s
    overheads_s = [sample.overhead_s for sample in samples]
    print(f"\nmean overhead of an iteration: {1e3 * statistics.mean(overheads_s):.2f} ms")  # noqa: T201
    assert 20 <= sum(bool(sample.report.slices) for sample in samples) <= 60
    assert max(overheads_s) <= YIELD_S + 1e-9
    told_s = sum(sample.forward_s + sample.slices_s + sample.overhead_s for sample in samples)
    assert told_s == pytest.approx(wall_s)
    assert planner.predictor.overhead_s <= YIELD_S


@pytest.mark.parametrize(
    ("sections", "has_tasks"),
    [
        ({}, False),
        ({"scheduler": {"policy": "inference_only"}}, True),
        ({"slo": {"ttft_s": 1.0, "tbt_s": 0.004}}, True),
    ],
    ids=["no tasks", "never trains", "no slack"],
)
def test_serving_without_slices_keeps_its_overlap_of_two_passes(make_engine, sections, has_tasks):
    engine = make_engine(**sections)
    for name in ("a", "b", "c"):
        engine.add(name, max_tokens=50)
    if has_tasks:
        engine.run(lambda: len(engine.passes) == 2)
        add_tasks(engine)
    engine.run(lambda: {"a", "b", "c"} <= engine.ended_s.keys())
    first, last = engine.passes[2], engine.passes[-1]
    assert overlapping(engine.passes[2:]) == len(engine.passes) - 3
    assert last.ready_s - first.ready_s == pytest.approx((len(engine.passes) - 3) * FORWARD_S)
    assert num_slices(engine) == 0
    assert set(engine.num_tokens.values()) == {50}


def test_slices_take_turns_with_the_overlap_as_the_slack_comes_and_goes(make_engine):
    engine = make_engine()
    engine.add("chat", max_tokens=200)
    engine.run(lambda: len(engine.passes) == SETTLED)
    assert overlapping(engine.passes) == SETTLED - 1
    add_tasks(engine, 2)
    engine.run(lambda: "step-1" in engine.ended_s)
    trained = len(engine.passes)
    assert overlapping(engine.passes[SETTLED:trained]) <= 1
    engine.run(lambda: "chat" in engine.ended_s)
    assert overlapping(engine.passes[trained:]) >= len(engine.passes) - trained - 2
    assert max(one.late_s for one in engine.passes) < 1e-9
    assert engine.num_tokens["chat"] == 200
    assert num_slices(engine) == 2 * SLICES_PER_STEP


def test_serving_keeps_most_of_its_overlap_where_the_slack_is_too_short_for_a_slice(make_engine):
    engine = make_engine(slo={"ttft_s": 1.0, "tbt_s": (FORWARD_S + LAUNCH_S + YIELD_S + SLICE_S / 2) / 0.8})
    engine.add("chat", max_tokens=SETTLED + 110)
    engine.run(lambda: len(engine.passes) == SETTLED)
    add_tasks(engine)
    engine.run(lambda: "chat" in engine.ended_s)
    assert num_slices(engine) <= 1
    budgets_s = [sample[5][2] for sample in engine.iterations()[-100:]]
    assert 5 <= sum(budget_s > 0 for budget_s in budgets_s) <= 25, "tries"
    assert overlapping(engine.passes[-100:]) >= 75


def test_the_budget_of_slices_does_not_pay_for_the_pass_before(make_engine):
    """With a budget below the time of a pass."""
    engine = make_engine(slo={"ttft_s": 1.0, "tbt_s": (0.6 * FORWARD_S + FORWARD_S + 3e-3) / 0.8})
    engine.add("chat", max_tokens=SETTLED + 100)
    engine.run(lambda: len(engine.passes) == SETTLED)
    add_tasks(engine)
    engine.run(lambda: "chat" in engine.ended_s)
    assert num_slices(engine) >= 150


def test_without_requests_the_result_of_a_step_does_not_wait_for_slices_of_the_next(make_engine):
    engine = make_engine()
    num_warm_up = len(engine.gpu.steps_done_s)
    add_tasks(engine, 3)
    engine.run()
    done_s = engine.gpu.steps_done_s[num_warm_up:]
    assert [engine.ended_s[f"step-{number}"] for number in range(3)] == pytest.approx(done_s, abs=1e-9)
    assert SLICES_PER_STEP % (IDLE_QUANTUM_S // SLICE_S) == 0, "each step ends with an iteration"


def test_the_last_token_does_not_wait_for_the_slices_of_an_idle_engine(make_engine):
    engine = make_engine()
    engine.add("chat", max_tokens=30)
    engine.run(lambda: len(engine.passes) == 29)
    add_tasks(engine, 3)
    engine.run()
    assert max(one.late_s for one in engine.passes) <= LAUNCH_S
    assert {f"step-{number}" for number in range(3)} <= engine.ended_s.keys()


@pytest.mark.parametrize("policy", ["continuous", "periodic"])
def test_tokens_do_not_wait_for_a_step_of_the_blocking_baselines(make_engine, policy):
    experiments = {"retrain_rate": 0.5, "period_requests": 2}
    engine = make_engine(scheduler={"policy": policy}, experiments=experiments)
    for number in range(4):
        engine.add(f"chat-{number}", max_tokens=30)
    engine.run(lambda: len(engine.passes) == 10)
    add_tasks(engine, 3)
    engine.run(lambda: all(f"chat-{number}" in engine.ended_s for number in range(4)))
    assert max(one.late_s for one in engine.passes) <= LAUNCH_S
    assert num_slices(engine) >= SLICES_PER_STEP
    assert overlapping(engine.passes) >= len(engine.passes) - 8


def test_an_answer_with_a_grammar_whose_sampling_waits_for_the_token_before(make_engine):
    """Of two batches in flight vLLM samples the second only when it has the tokens of the first."""
    engine = make_engine()
    engine.add("chat", max_tokens=60, regex="[a-z]{100}")
    engine.run(lambda: len(engine.passes) == 20)
    assert engine.worker.num_deferred == 20 - 1
    add_tasks(engine, 2)
    engine.run()
    assert engine.num_tokens["chat"] == 60
    assert num_slices(engine) == 2 * SLICES_PER_STEP
    assert 17 <= overlapping(engine.passes) < 59
    assert max(one.late_s for one in engine.passes) <= LAUNCH_S


def test_aborts_reach_the_worker_and_the_engine_comes_to_rest(make_engine):
    engine = make_engine()
    engine.add("chat", max_tokens=60)
    add_tasks(engine, 2)
    engine.run(lambda: len(engine.passes) == 20)
    for name in ("step-0", "step-1"):
        engine.abort(name)
    engine.run(lambda: len(engine.passes) == 40)
    trained = num_slices(engine)
    engine.abort("chat")
    engine.add_task("later")
    engine.abort("later")
    engine.run()
    assert num_slices(engine) == trained
    assert not engine.has_work()
