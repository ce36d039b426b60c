import pytest

from core.batch import ForwardShape, IterationSample, Plan
from core.types import SliceKind, SliceReport, SliceTiming
from deployments.monitors.iteration_monitor import IterationMonitor


def sample(forward_s, predicted_s, *, slices_s=0.0, budget_s=0.0, tokens=1):
    slices = [SliceTiming(SliceKind.LOSS, 1, slices_s)] if slices_s else []
    return IterationSample(
        ForwardShape(num_decode=tokens),
        forward_s,
        overhead_s=0.001,
        report=SliceReport(slices),
        plan=Plan(predicted_forward_s=predicted_s, finetune_budget_s=budget_s),
    )


def test_nothing_is_claimed_before_anything_was_measured():
    summary = IterationMonitor().summary()
    assert summary["iterations"] == 0
    assert summary["forward_prediction_error"] is None


def test_errors_are_relative_to_what_was_measured():
    monitor = IterationMonitor()
    monitor.observe([sample(0.1, 0.08), sample(0.1, 0.1), sample(0.1, 0.15), sample(0.1, None)])
    assert monitor.summary()["forward_prediction_error"]["median"] == pytest.approx(0.2)


def test_slices_beyond_their_budget_show_except_those_of_an_idle_engine():
    monitor = IterationMonitor()
    monitor.observe([sample(0.1, 0.1, slices_s=0.03, budget_s=0.02), sample(0.0, 0.0, slices_s=0.5, tokens=0)])
    summary = monitor.summary()
    assert summary["slices_over_budget_s"]["p95"] == pytest.approx(0.01)
    assert summary["slices_s"] == pytest.approx(0.53)
    assert summary["forward_s"] == pytest.approx(0.1)
