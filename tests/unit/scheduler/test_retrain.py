import pytest

from scheduler.iteration.retrain import RetrainMeter
from tests.support.known_device import settings


def meter(**config):
    return RetrainMeter(settings(**config))


def test_mace_may_always_train_below_its_cap():
    assert meter().may_train()
    capped = meter(retrain_rate_cap=0.5)
    capped.note_requests(2)
    capped.note_trained(1)
    assert not capped.may_train()
    capped.note_requests(1)
    assert capped.may_train()


def test_inference_only_never_may():
    assert not meter(policy="inference_only").may_train()


@pytest.mark.parametrize("policy", ["periodic", "continuous"])
def test_a_baseline_may_train_only_when_a_phase_is_due(policy):
    subject = meter(policy=policy, retrain_rate=0.5, period_requests=10)
    assert not subject.may_train()
    subject.note_requests(10)
    assert subject.may_train()
    assert subject.is_blocking_due(has_work=True, now_s=0.0)
    subject.note_trained(4)
    assert subject.may_train()  # the phase goes on until the quota of five
    subject.note_trained(1)
    assert not subject.may_train()
    assert not subject.is_blocking_due(has_work=True, now_s=0.0)


def phase(subject, *, steps, gap_s, pairs=8):
    """Steps of `pairs` pairs with a gap after each; returns how many of them ran."""
    now_s, ran = 100.0, 0
    for _ in range(steps):
        if not subject.is_blocking_due(has_work=True, now_s=now_s):
            break
        ran += 1
        subject.note_trained(pairs)
        subject.is_blocking_due(has_work=False, now_s=now_s + gap_s)
        now_s += gap_s
    return ran


def test_the_gap_between_two_steps_is_not_the_end_of_a_phase():
    subject = meter(policy="periodic", retrain_rate=8.0, period_requests=10)
    subject.note_requests(10)
    assert phase(subject, steps=100, gap_s=0.3) == 10  # 80 pairs


def test_a_phase_outlasts_a_candidate_that_is_judged_and_published():
    subject = meter(policy="periodic", retrain_rate=8.0, period_requests=10)
    subject.note_requests(10)
    assert phase(subject, steps=100, gap_s=2.0) == 10
    subject = meter(policy="periodic", retrain_rate=8.0, period_requests=10, phase_gap_s=0.5)
    subject.note_requests(10)
    assert phase(subject, steps=100, gap_s=2.0) == 1


def test_a_phase_without_work_ends_and_the_next_one_waits_for_its_requests():
    subject = meter(policy="periodic", retrain_rate=8.0, period_requests=10)
    subject.note_requests(10)
    assert phase(subject, steps=100, gap_s=5.0) == 1
    subject.note_requests(9)
    assert not subject.is_blocking_due(has_work=True, now_s=200.0)
    subject.note_requests(1)
    assert subject.is_blocking_due(has_work=True, now_s=200.0)


def test_inference_goes_on_in_the_gaps():
    subject = meter(policy="periodic", retrain_rate=8.0, period_requests=10)
    subject.note_requests(10)
    assert subject.is_blocking_due(has_work=True, now_s=0.0)
    assert not subject.is_blocking_due(has_work=False, now_s=0.1)
    assert subject.is_blocking_due(has_work=True, now_s=0.2)
