import pytest

from core.config import SchedulerConfig, SloConfig
from scheduler.iteration import IDLE_QUANTUM_S, IterationPlanner, IterationState

SLO = SloConfig(ttft_s=1.0, tbt_s=0.1)


def state(decode=0, prefill=0, wait=None, work=True):
    return IterationState(
        num_decode_tokens=decode,
        num_prefill_tokens=prefill,
        oldest_first_token_wait_s=wait,
        has_finetune_work=work,
    )


def planner(**kwargs):
    return IterationPlanner(SchedulerConfig(**kwargs), SLO)


def test_an_idle_engine_trains_for_one_quantum_and_at_least_one_slice():
    plan = planner().plan(state())
    assert plan.finetune_budget_s == IDLE_QUANTUM_S
    assert plan.min_slices == 1


def test_without_fine_tune_work_the_budget_is_zero():
    assert planner().plan(state(work=False)).finetune_budget_s == 0
    assert planner().plan(state(decode=4, work=False)).min_slices == 0


def test_nothing_is_spent_before_a_forward_pass_was_measured():
    assert planner().plan(state(decode=4)).finetune_budget_s == 0


def test_the_budget_is_the_slack_before_the_tbt_target():
    subject = planner(slack_fraction=0.8)
    subject.observe(4, forward_s=0.03, overhead_s=0.0)
    assert subject.plan(state(decode=4)).finetune_budget_s == pytest.approx(0.8 * 0.1 - 0.03)


def test_a_forward_pass_beyond_the_target_leaves_nothing():
    subject = planner()
    subject.observe(4, forward_s=0.5, overhead_s=0.0)
    plan = subject.plan(state(decode=4))
    assert plan.finetune_budget_s == 0
    assert plan.min_slices == 0


def test_a_request_close_to_its_ttft_target_takes_the_slack():
    subject = planner(slack_fraction=1.0)
    subject.observe(64, forward_s=0.02, overhead_s=0.0)
    assert subject.plan(state(prefill=64, wait=0.95)).finetune_budget_s == pytest.approx(1.0 - 0.95 - 0.02)
    assert subject.plan(state(prefill=64, wait=2.0)).finetune_budget_s == 0


def test_the_prediction_follows_a_device_that_becomes_slower():
    subject = planner()
    for _ in range(20):
        subject.observe(4, forward_s=0.01, overhead_s=0.0)
    for _ in range(20):
        subject.observe(4, forward_s=0.02, overhead_s=0.0)
    assert subject.plan(state(decode=4)).predicted_forward_s == pytest.approx(0.02, rel=0.05)


def test_inference_only_never_trains():
    subject = planner(policy="inference_only")
    assert subject.plan(state()).min_slices == 0
    assert subject.plan(state()).finetune_budget_s == 0
