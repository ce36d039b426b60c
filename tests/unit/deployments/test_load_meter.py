import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.batch import ForwardShape, IterationSample
from core.types import SliceKind, SliceReport, SliceTiming
from deployments.routing.load_meter import LoadMeter, PromptSpeed
from engine.vllm.engine import EngineLoad
from tests.support.clock import Clock


def iteration(num_prefill_tokens, wall_s):
    """Wall time in three parts: what a prompt waits for is all of it."""
    slices = [SliceTiming(next(iter(SliceKind)), 8, wall_s / 4)]
    shape = ForwardShape(num_prefill_tokens=num_prefill_tokens)
    return IterationSample(shape, forward_s=wall_s / 2, overhead_s=wall_s / 4, report=SliceReport(slices))


def speed_of(*iterations):
    speed = PromptSpeed()
    for num_tokens, wall_s in iterations:
        speed.observe(iteration(num_tokens, wall_s))
    return speed


def test_nothing_is_known_before_a_prompt_was_measured():
    assert PromptSpeed().prompt_token_s is None
    assert PromptSpeed().fixed_s == 0.0
    decode_only = speed_of((0, 0.02), (0, 0.02))
    assert decode_only.prompt_token_s is None
    assert decode_only.fixed_s == pytest.approx(0.02)


@given(
    st.floats(1e-6, 1e-2),
    st.floats(0.0, 0.5),
    st.lists(st.integers(0, 4096), min_size=2, max_size=40).filter(
        lambda sizes: max(sizes) > 1.2 * min(sizes) + 8
    ),
)
def test_slope_and_intercept_of_exact_measurements_are_found(per_token_s, fixed_s, sizes):
    speed = speed_of(*((size, fixed_s + per_token_s * size) for size in sizes))
    assert speed.prompt_token_s == pytest.approx(per_token_s, rel=1e-3)
    assert speed.fixed_s == pytest.approx(fixed_s, rel=1e-3, abs=1e-4)


def test_chunks_of_one_size_are_charged_with_all_the_time():
    speed = speed_of(*[(100, 0.05)] * 20)
    assert speed.prompt_token_s == pytest.approx(0.0005)
    assert speed.fixed_s == pytest.approx(0.0, abs=1e-9)


def test_noise_that_makes_longer_prompts_look_cheaper_gives_no_negative_price():
    speed = speed_of((10, 0.05), (1000, 0.04))
    assert speed.prompt_token_s > 0
    assert speed.fixed_s >= 0


def test_a_device_that_becomes_slower_is_noticed():
    before, after = (
        [(n, 0.01 + n * 1e-4) for n in (10, 200)] * 100,
        [(n, 0.02 + n * 2e-4) for n in (10, 200)] * 100,
    )
    assert speed_of(*before, *after).prompt_token_s == pytest.approx(2e-4, rel=0.05)


def meter_of(batches, times=(40.0, 41.0, 42.0)):
    """Measures a batch of iterations at each of the times, with a meter that is built at the first one."""
    clock = iter(times)
    queue = EngineLoad(
        free_kv_bytes=7.0, kv_capacity_bytes=10.0, kv_bytes_per_token=1.0, waiting_tokens=30, num_running=2
    )
    meter = LoadMeter("e1", 0.5, clock=lambda: next(clock))
    return meter, lambda: meter.measure(queue, batches.pop(0))


def test_the_report_joins_queue_and_speed_and_an_idle_engine_has_no_wait():
    meter, measure = meter_of([[iteration(n, 0.01 + n * 1e-4) for n in (10, 200)], []])
    assert meter.latest is None
    busy = measure()
    assert busy == meter.latest
    assert (busy.executor_id, busy.reported_s, busy.ttft_target_s) == ("e1", 41.0, 0.5)
    assert (busy.free_kv_bytes, busy.waiting_tokens, busy.num_running) == (7.0, 30, 2)
    assert busy.prompt_token_s == pytest.approx(1e-4)
    idle = measure()
    assert idle.wait_s == 0.0
    assert idle.prompt_token_s == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("walls_s", "expected_s"),
    [
        ([0.02] * 50, 0.01 + 0.02),  # always at work: half of an iteration, then all of its own
        ([0.02] * 5, 0.001 + 0.002),  # a tenth of the time
        ([0.5], 0.125 + 0.25),
        ([0.02] * 100, 0.01 + 0.02),  # more time than there was: two iterations at once
    ],
)
def test_a_prompt_waits_for_the_iteration_that_it_comes_into_as_often_as_there_is_one(walls_s, expected_s):
    _, measure = meter_of([[iteration(0, wall_s) for wall_s in walls_s]])
    assert measure().wait_s == pytest.approx(expected_s)


def test_one_long_iteration_waits_longer_than_many_short_ones_of_the_same_time():
    _, long = meter_of([[iteration(0, 0.4)]])
    _, short = meter_of([[iteration(0, 0.01)] * 40])
    assert long().wait_s > 5 * short().wait_s


def test_a_clock_that_was_set_back_gives_no_negative_wait():
    _, measure = meter_of([[iteration(0, 0.1)]], times=(40.0, 10.0))
    assert measure().wait_s == pytest.approx(0.15)


def test_a_report_that_still_holds_comes_again_with_its_time_for_a_few_seconds():
    clock = Clock(100.0)
    meter = LoadMeter("e", 1.0, clock)
    quiet = EngineLoad(1e6, 1e6, 64.0, 0, 0)
    first = meter.measure(quiet, [])
    clock.now_s += 4.0
    assert meter.measure(quiet, []) == first
    assert meter.measure(EngineLoad(1e6, 1e6, 64.0, 8, 0), []).reported_s == clock.now_s
    changed = meter.measure(quiet, [])
    assert changed.reported_s == clock.now_s
    clock.now_s += 5.0
    assert meter.measure(quiet, []).reported_s == clock.now_s
    clock.now_s += 1.0
    assert meter.measure(quiet, [iteration(10, 0.1)]).reported_s == clock.now_s
