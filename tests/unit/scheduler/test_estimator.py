import pytest

from core.types import SliceKind
from scheduler.iteration.slices import SliceAdmission


def test_a_slice_is_estimated_by_the_slowest_recent_one():
    slices = SliceAdmission()
    for latency_s in (0.01, 0.05, 0.02):
        slices.observe(SliceKind.POLICY_LAYER, 128, latency_s)
    assert slices.upper_s(SliceKind.POLICY_LAYER, 128) == 0.05
    assert slices.upper_s(SliceKind.POLICY_LAYER, 512) == pytest.approx(0.2)
    assert slices.upper_s(SliceKind.OPTIMIZER, 0) is None


def test_an_outlier_leaves_the_window():
    slices = SliceAdmission()
    slices.observe(SliceKind.LOSS, 8, 9.0)
    for _ in range(32):
        slices.observe(SliceKind.LOSS, 8, 0.01)
    assert slices.upper_s(SliceKind.LOSS, 8) == 0.01


def test_relaxing_forgets_the_slowest_but_never_the_last():
    slices = SliceAdmission()
    slices.observe(SliceKind.LOSS, 8, 0.5)
    slices.observe(SliceKind.LOSS, 8, 0.1)
    slices.relax(SliceKind.LOSS, 8)
    slices.relax(SliceKind.LOSS, 8)
    assert slices.upper_s(SliceKind.LOSS, 8) == 0.1
