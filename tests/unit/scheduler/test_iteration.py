import pytest

from core.batch import ForwardShape, IterationSample
from core.config import SloConfig
from core.types import SliceKind, SliceReport, SliceTiming
from scheduler.iteration.planner import IDLE_QUANTUM_S, NEWCOMER_SHARE
from scheduler.memory.ledger import Pool
from scheduler.view import FineTuneState, IterationView, PrefillTask
from tests.support.known_device import STARVATION_BOUND_S, KnownDevice, UnknownDevice, make_planner


def work(last_progress_s=0.0, **kwargs):
    return FineTuneState(last_progress_s=last_progress_s, **kwargs)


def view(decode=0, prefills=(), now_s=0.0, finetune=None, context=0, **kwargs):
    tasks = [PrefillTask(f"r{i}", arrived_s, tokens) for i, (tokens, arrived_s) in enumerate(prefills)]
    return IterationView(
        now_s, num_decode=decode, decode_context=context, prefills=tasks, finetune=finetune, **kwargs
    )


def run(planner, state, shape=None):
    plan = planner.plan(state)
    if shape is None:
        shape = ForwardShape(num_decode=state.num_decode)
        if plan.token_budget > state.num_decode and state.prefills:
            shape.add_chunk(min(plan.token_budget - state.num_decode, state.prefills[0].num_tokens), 0)
    return planner.settle(plan, state, shape)


def test_an_idle_engine_trains_for_one_quantum_and_at_least_one_slice():
    plan = run(make_planner(), view(finetune=work()))
    assert (plan.finetune_budget_s, plan.min_slices) == (IDLE_QUANTUM_S, 1)


def test_without_fine_tune_work_there_is_no_budget():
    assert run(make_planner(), view(decode=4)).finetune_budget_s == 0
    assert run(make_planner(), view()).min_slices == 0


def test_inference_only_never_trains():
    plan = run(make_planner(policy="inference_only"), view(finetune=work()))
    assert (plan.finetune_budget_s, plan.min_slices) == (0, 0)


def test_an_unknown_device_is_measured_before_anything_is_spent_or_limited():
    planner = make_planner(UnknownDevice())
    plan = run(planner, view(decode=4, prefills=[(5000, 0.0)], finetune=work()))
    assert plan.token_budget == 2048
    assert (plan.finetune_budget_s, plan.predicted_forward_s) == (0, None)


def test_the_budget_is_the_slack_before_the_tbt_target():
    plan = run(make_planner(slack_fraction=0.8), view(decode=4, finetune=work()))
    assert plan.predicted_forward_s == pytest.approx(0.012)
    assert plan.finetune_budget_s == pytest.approx(0.8 * 0.1 - 0.012 - 0.001)


def test_a_forward_pass_beyond_the_target_leaves_nothing():
    plan = run(make_planner(), view(decode=400, finetune=work()))
    assert (plan.finetune_budget_s, plan.min_slices) == (0, 0)


def test_a_chunk_fills_what_decoding_leaves_of_the_iteration():
    planner = make_planner(slack_fraction=1.0)
    plan = planner.plan(view(decode=10, prefills=[(2000, 0.0)]))
    chunk = plan.token_budget - 10
    device = planner.predictor
    capacity_s = 0.1 - device.overhead_s
    assert chunk % 16 == 0
    assert device.forward_s(ForwardShape(num_decode=10, num_prefill_tokens=chunk)) <= capacity_s
    assert device.forward_s(ForwardShape(num_decode=10, num_prefill_tokens=chunk + 16)) > capacity_s


def test_a_short_prompt_goes_whole_and_the_next_one_takes_the_rest():
    plan = make_planner(slack_fraction=1.0).plan(view(decode=10, prefills=[(20, 0.0), (2000, 0.1)]))
    assert plan.max_chunk_tokens < 2000
    assert 20 < plan.token_budget - 10 <= 168


def test_prompts_go_on_slowly_when_decoding_alone_fills_the_iteration():
    plan = make_planner().plan(view(decode=400, prefills=[(2000, 0.0)]))
    assert plan.token_budget == 432


def test_with_nobody_decoding_a_prompt_may_take_half_the_ttft_target():
    planner = make_planner(slack_fraction=1.0, slo=SloConfig(ttft_s=1.0, tbt_s=0.1))
    assert planner.plan(view(prefills=[(900, 0.0)])).token_budget == 900
    assert planner.plan(view(prefills=[(2000, 0.0)])).token_budget == pytest.approx(978, abs=16)


def test_no_seat_means_no_chunk_for_waiting_requests_but_the_engine_is_not_stopped():
    plan = make_planner().plan(view(decode=10, prefills=[(50, 0.0)], free_seats=0))
    assert plan.token_budget >= 10


def test_an_engine_that_cannot_chunk_is_never_limited():
    plan = make_planner(limits={"can_chunk_prefills": False}).plan(view(decode=10, prefills=[(2000, 0.0)]))
    assert (plan.token_budget, plan.max_chunk_tokens) == (2048, 0)


def test_a_request_close_to_its_ttft_target_takes_the_slack():
    planner = make_planner(slack_fraction=1.0)
    late = view(prefills=[(64, 0.0)], now_s=0.95, finetune=work())
    assert run(planner, late).finetune_budget_s == pytest.approx(1.0 - 0.95 - 0.042 - 0.001)
    too_late = view(prefills=[(64, 0.0)], now_s=2.0, finetune=work(last_progress_s=1.9))
    assert run(planner, too_late).finetune_budget_s == 0


def test_while_a_prompt_is_computed_slices_add_a_fifth_to_it_at_most():
    planner = make_planner(slo=SloConfig(ttft_s=10.0, tbt_s=0.1))
    alone = run(planner, view(prefills=[(200, 0.0)], finetune=work()))
    assert alone.finetune_budget_s == pytest.approx(NEWCOMER_SHARE * 0.111)
    beside = run(planner, view(decode=4, prefills=[(20, 0.0)], finetune=work()))
    assert beside.finetune_budget_s == pytest.approx(NEWCOMER_SHARE * 0.023)
    waiting = view(decode=4, prefills=[(20, 0.0)], finetune=work())
    assert run(planner, waiting, ForwardShape(num_decode=4)).finetune_budget_s == 0


def test_no_slice_of_an_engine_without_requests_outlasts_a_prompt():
    """A step keeps the size of its slices, and who comes next waits for the one that runs."""
    device = KnownDevice(base_s=0.002, token_s=0.0001, slice_token_s=0.0001)
    planner = make_planner(device, arena_bytes=1 << 30, slo=SloConfig(ttft_s=10.0, tbt_s=1.0))
    prompt_s = device.forward_s(ForwardShape(num_prefill_tokens=128))
    idle = planner.plan(view(finetune=work()))
    assert 0.5 * prompt_s < device.slice_s(SliceKind.BACKWARD_LAYER, idle.slice_tokens) <= prompt_s


def test_prompts_ahead_in_the_queue_count_against_the_slack():
    planner = make_planner(slack_fraction=1.0, slo=SloConfig(ttft_s=1.0, tbt_s=10.0))
    alone = run(planner, view(prefills=[(400, 0.0)], now_s=0.14, finetune=work()))
    assert alone.finetune_budget_s == pytest.approx(NEWCOMER_SHARE * 0.211)
    behind = view(
        prefills=[(400, 0.0)],
        now_s=0.14,
        finetune=work(),
        num_waiting_unseen=3,
        unseen_tokens=1200,
        oldest_unseen_s=0.0,
    )
    assert run(planner, behind).finetune_budget_s == pytest.approx(0.86 - 4 * 0.211)


def test_while_somebody_waits_for_a_seat_or_for_blocks_nothing_is_spent():
    """Slices would make the running requests hold their seats longer."""
    no_seat = view(decode=4, prefills=[(20, 0.0)], free_seats=0, finetune=work())
    assert run(make_planner(), no_seat, ForwardShape(num_decode=4)).finetune_budget_s == 0
    more_than_seats = view(
        decode=4,
        prefills=[(20, 0.0)],
        free_seats=3,
        num_waiting_unseen=3,
        unseen_tokens=60,
        oldest_unseen_s=0.0,
        finetune=work(),
    )
    assert run(make_planner(), more_than_seats).finetune_budget_s == 0
    no_blocks = view(decode=4, prefills=[(20, 0.0)], free_seats=3, finetune=work())
    assert run(make_planner(), no_blocks, ForwardShape(num_decode=4)).finetune_budget_s == 0
    started = view(decode=4, prefills=[(20, 0.0)], free_seats=3, finetune=work())
    assert run(make_planner(), started).finetune_budget_s > 0


def test_aged_work_gets_a_slice_without_slack_within_the_stated_bound():
    planner = make_planner()
    bound_s = STARVATION_BOUND_S
    starved = view(decode=400, now_s=bound_s + 1, finetune=work(dpo_loss=0.0))
    assert run(planner, starved).min_slices == 1
    early = view(decode=400, now_s=0.5 * bound_s, finetune=work(dpo_loss=0.0))
    assert run(planner, early).min_slices == 0


def test_a_high_loss_reaches_its_turn_sooner_unless_the_reward_term_is_off():
    now_s = STARVATION_BOUND_S - 10
    state = view(decode=400, now_s=now_s, finetune=work(dpo_loss=5.0))
    assert run(make_planner(), state).min_slices == 1
    assert run(make_planner(reward_term=False), state).min_slices == 0


def test_without_ageing_nothing_is_forced():
    state = view(decode=400, now_s=1e9, finetune=work())
    assert run(make_planner(ageing=False), state).min_slices == 0


def test_the_floor_of_the_retrain_rate_trains_without_slack_and_the_cap_stops_it_with_slack():
    floor = make_planner(retrain_rate_floor=0.5)
    floor.retrain.note_requests(10)
    assert run(floor, view(decode=400, finetune=work())).min_slices == 1
    floor.retrain.note_trained(5)
    assert run(floor, view(decode=400, finetune=work())).min_slices == 0
    cap = make_planner(retrain_rate_cap=0.5)
    cap.retrain.note_requests(10)
    assert run(cap, view(decode=1, finetune=work())).finetune_budget_s > 0
    cap.retrain.note_trained(5)
    assert run(cap, view(decode=1, finetune=work())).finetune_budget_s == 0


@pytest.mark.parametrize(("policy", "period"), [("periodic", 50), ("continuous", 2)])
def test_a_blocking_baseline_stops_inference_until_its_quota_is_trained(policy, period):
    planner = make_planner(policy=policy, retrain_rate=0.5)
    state = view(decode=4, finetune=work())
    planner.retrain.note_requests(period - 1)
    assert run(planner, state).finetune_budget_s == 0  # they never train beside inference
    planner.retrain.note_requests(1)
    plan = planner.plan(state)
    assert plan.is_blocking
    assert plan.token_budget == 0
    planner.retrain.note_trained(period // 2)
    assert not planner.plan(state).is_blocking
    planner.retrain.note_requests(period - 1)
    assert not planner.plan(state).is_blocking


def test_a_baseline_does_not_block_for_work_that_is_not_there():
    planner = make_planner(policy="continuous")
    planner.retrain.note_requests(100)
    assert not planner.plan(view(decode=4)).is_blocking


def test_slices_are_as_large_as_the_usual_slack_and_smaller_under_load():
    planner = make_planner(KnownDevice(slice_token_s=0.0001))
    assert run(planner, view(decode=1, finetune=work())).slice_tokens == 512  # 51 ms of 68
    for _ in range(100):
        plan = run(planner, view(decode=100, finetune=work()))  # 79 - 60 = 19 ms left
    assert plan.slice_tokens == 128


def test_first_fit_takes_the_configured_slice_size_whatever_the_slack():
    planner = make_planner(KnownDevice(slice_token_s=0.001), packing="first_fit")
    assert run(planner, view(decode=1, finetune=work())).slice_tokens == 1024


def test_running_out_of_memory_halves_the_slices_and_shrinks_the_arena():
    planner = make_planner(
        KnownDevice(slice_token_s=1e-6),
        limits={"arena_bytes_per_token": 100},
        arena_bytes=1 << 30,
    )
    assert run(planner, view(finetune=work())).slice_tokens == 1024
    planner.observe(IterationSample(ForwardShape(), 0.0, report=SliceReport(out_of_memory=True)))
    assert planner.memory.pool_capacity_bytes(Pool.ARENA) == 1024 * 100
    assert run(planner, view(finetune=work())).slice_tokens == 512


def test_what_a_token_holds_is_learnt_from_measured_steps():
    planner = make_planner(KnownDevice(slice_token_s=1e-6), arena_bytes=100_000, kv_bytes=0, tau_mem=1.0)
    slices = [SliceTiming(SliceKind.POLICY_LAYER, 100, 0.001)]
    planner.observe(IterationSample(ForwardShape(), 0.0, report=SliceReport(slices, peak_bytes=30_000)))
    assert run(planner, view(finetune=work())).slice_tokens == 256  # 300 bytes for each of them
    assert planner.memory.pool_used_bytes(Pool.ARENA) == 256 * 300


def test_a_kv_cache_that_has_taken_the_memory_makes_training_wait():
    planner = make_planner(
        limits={"arena_bytes_per_token": 500},
        kv_bytes=1_000_000,
        arena_bytes=100_000,
        tau_mem=0.95,
    )
    plan = run(planner, view(decode=1, finetune=work(max_batch_tokens=200), used_kv_bytes=1_000_000))
    assert (plan.finetune_budget_s, plan.min_slices) == (0, 0)
    planner.memory.check_integrity()


def test_a_pair_larger_than_the_arena_is_tried_rather_than_kept_for_ever():
    planner = make_planner(limits={"arena_bytes_per_token": 500}, arena_bytes=10_000)
    assert run(planner, view(finetune=work(max_batch_tokens=1000))).min_slices == 1


def test_the_arena_recovers_after_it_once_was_too_small():
    limits = {"arena_bytes_per_token": 100}
    planner = make_planner(KnownDevice(slice_token_s=1e-6), limits=limits, arena_bytes=1 << 20)
    run(planner, view(finetune=work()))
    planner.observe(IterationSample(ForwardShape(), 0.0, report=SliceReport(out_of_memory=True)))
    slices = [SliceTiming(SliceKind.POLICY_LAYER, 512, 0.001)]
    for _ in range(2000):
        planner.observe(IterationSample(ForwardShape(), 0.0, report=SliceReport(slices, peak_bytes=51_200)))
    assert planner.memory.pool_capacity_bytes(Pool.ARENA) == 1 << 20
    sizes = [run(planner, view(finetune=work())).slice_tokens for _ in range(32)]
    assert sizes[-1] == 1024


def test_a_small_micro_batch_with_large_gradients_does_not_shrink_the_large_ones():
    planner = make_planner(KnownDevice(slice_token_s=1e-6), arena_bytes=512_000_000, kv_bytes=0)
    for tokens in (1024, 32):
        slices = [SliceTiming(SliceKind.POLICY_LAYER, tokens, 0.001)]
        report = SliceReport(slices, peak_bytes=35_000_000 + 43_000 * tokens)
        planner.observe(IterationSample(ForwardShape(), 0.0, report=report))
    assert run(planner, view(finetune=work())).slice_tokens == 1024


def test_work_that_waited_too_long_may_pass_tau_but_not_the_arena():
    planner = make_planner(limits={"arena_bytes_per_token": 500}, kv_bytes=1_000_000, arena_bytes=100_000)
    state = view(decode=1, now_s=1e6, finetune=work(max_batch_tokens=200), used_kv_bytes=1_000_000)
    assert run(planner, state).min_slices == 1
    planner.memory.check_integrity()


def test_a_cap_on_training_does_not_hold_back_a_score():
    planner = make_planner(retrain_rate_cap=0.1)
    planner.retrain.note_requests(10)
    planner.retrain.note_trained(8)
    assert run(planner, view(finetune=work())).min_slices == 0
    assert run(planner, view(finetune=work(is_training=False))).min_slices == 1


@pytest.mark.parametrize("policy", ["periodic", "continuous"])
def test_a_baseline_scores_at_once(policy):
    assert make_planner(policy=policy).plan(view(decode=4, finetune=work(is_training=False))).is_blocking


def test_a_prefix_hit_does_not_look_like_a_slow_device():
    planner = make_planner(slack_fraction=1.0, slo=SloConfig(ttft_s=1.0, tbt_s=0.1))
    state = view(decode=4, prefills=[(2000, 0.0)], finetune=work())
    plan = planner.plan(state)
    shape = ForwardShape(num_decode=4)
    shape.add_chunk(10, 1990)  # the other 1990 tokens were in the cache
    assert planner.settle(plan, state, shape).finetune_budget_s == pytest.approx(NEWCOMER_SHARE * 0.018)


def test_draft_tokens_of_running_requests_are_in_the_budget():
    plan = make_planner().plan(view(decode=10, decode_tokens=40, prefills=[(20, 0.0)]))
    assert plan.token_budget == 60


def test_a_prompt_is_cut_to_the_memory_that_is_left():
    planner = make_planner(
        slack_fraction=1.0, limits={"max_tokens": 4096, "kv_bytes_per_token": 10}, kv_bytes=2000, arena_bytes=1000
    )
    assert planner.plan(view(prefills=[(900, 0.0)])).token_budget == 285  # 0.95 of 3000 bytes


def test_the_chunk_cap_is_that_of_the_longest_chunk():
    assert make_planner().plan(view(prefills=[(20, 0.0), (300, 0.0)])).max_chunk_tokens == 300


def test_work_that_stands_before_the_prompts_keeps_time_for_a_slice():
    fresh = view(decode=4, prefills=[(2000, 1000.0)], now_s=1000.0, finetune=work(last_progress_s=1000.0))
    aged = view(decode=4, prefills=[(2000, 1000.0)], now_s=1000.0, finetune=work())
    planner = make_planner(KnownDevice(slice_token_s=0.0001))
    assert planner.plan(aged).token_budget < planner.plan(fresh).token_budget - 16


def test_the_upper_estimate_and_not_the_mean_has_to_fit():
    certain, noisy = (
        make_planner(KnownDevice(upper=upper)).plan(view(decode=4, prefills=[(2000, 0.0)])) for upper in (1.0, 1.5)
    )
    assert noisy.token_budget < certain.token_budget


def test_an_engine_that_may_not_train_sleeps_but_wakes_to_score():
    capped = make_planner(retrain_rate_cap=0.1)
    capped.retrain.note_requests(1)
    capped.retrain.note_trained(8)
    assert not capped.may_run(None)
    assert not capped.may_run(work())
    assert capped.may_run(work(is_training=False))
    assert not make_planner(policy="inference_only").may_run(work(is_training=False))
    assert make_planner(policy="continuous").may_run(work(is_training=False))
