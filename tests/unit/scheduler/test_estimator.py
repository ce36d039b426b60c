import pytest

from core.types import SliceKind
from scheduler.iteration.estimator import SliceEstimator


def test_a_slice_is_estimated_by_the_slowest_recent_one():
    estimator = SliceEstimator()
    for latency_s in (0.01, 0.05, 0.02):
        estimator.observe(SliceKind.POLICY_LAYER, 128, latency_s)
    assert estimator.predict(SliceKind.POLICY_LAYER, 128) == 0.05
    assert estimator.predict(SliceKind.POLICY_LAYER, 512) == pytest.approx(0.2)
    assert estimator.predict(SliceKind.OPTIMIZER, 0) is None


def test_an_outlier_leaves_the_window():
    estimator = SliceEstimator()
    estimator.observe(SliceKind.LOSS, 8, 9.0)
    for _ in range(32):
        estimator.observe(SliceKind.LOSS, 8, 0.01)
    assert estimator.predict(SliceKind.LOSS, 8) == 0.01


def test_relaxing_forgets_the_slowest_but_never_the_last():
    estimator = SliceEstimator()
    estimator.observe(SliceKind.LOSS, 8, 0.5)
    estimator.observe(SliceKind.LOSS, 8, 0.1)
    estimator.relax(SliceKind.LOSS, 8)
    estimator.relax(SliceKind.LOSS, 8)
    assert estimator.predict(SliceKind.LOSS, 8) == 0.1
