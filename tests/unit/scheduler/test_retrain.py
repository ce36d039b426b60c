import pytest

from core.config import SchedulerConfig
from scheduler.retrain import RetrainMeter


def meter(**config):
    return RetrainMeter(SchedulerConfig(**config))


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
    assert subject.is_blocking_due(has_work=True)
    subject.note_trained(4)
    assert subject.may_train()  # the phase goes on until the quota of five
    subject.note_trained(1)
    assert not subject.may_train()
    assert not subject.is_blocking_due(has_work=True)


def test_the_rate_is_pairs_for_each_request():
    subject = meter()
    assert subject.rate == 0.0
    subject.note_trained(3)
    assert subject.rate == float("inf")
    subject.note_requests(6)
    assert subject.rate == 0.5
