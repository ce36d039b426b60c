"""The planner with what clients see, in virtual time: an engine, a front end behind it, and the reports of its edge."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.batch import EdgeReport, ForwardShape, IterationSample
from core.config import SloConfig
from core.types import SliceKind, SliceReport, SliceTiming
from scheduler.iteration.edge import FORGET_S, EdgeController, upper_quantile
from scheduler.view import FineTuneState, IterationView, PrefillTask
from tests.support.clock import Clock
from tests.support.known_device import make_planner

TBT_S = 0.1
REPORT_S = 0.5


class Served:
    """Four streams for ever, on an engine that always has something to train."""

    def __init__(self):
        self.clock = Clock()
        self.planner = make_planner(slo=SloConfig(ttft_s=1.0, tbt_s=TBT_S))
        self.front_end_s = lambda: 0.001
        """Seconds that the front end needs for a chunk."""
        self.slow_down = 1.0
        """Factor of the device's own time, of which the predictor knows nothing."""
        self._free_s = self._left_s = 0.0
        self._gaps = []

    def run(self, seconds):
        """Serve; returns the share of gaps within the target and the share of the time that went to training."""
        start_s, gaps, trained_s = self.clock(), [], 0.0
        reported_s = start_s
        while self.clock() < start_s + seconds:
            trained_s += self._iterate(gaps)
            if self.clock() - reported_s >= REPORT_S:
                reported_s = self.clock()
                late = sum(gap > TBT_S for gap in self._gaps)
                report = EdgeReport(len(self._gaps), late, upper_quantile(self._gaps))
                self.planner.observe_edge(report, self.clock())
                self._gaps.clear()
        return sum(gap <= TBT_S for gap in gaps) / len(gaps), trained_s / (self.clock() - start_s)

    def _iterate(self, gaps):
        now_s = self.clock()
        view = IterationView(now_s, num_decode=4, finetune=FineTuneState(last_progress_s=now_s))
        shape = ForwardShape(num_decode=4)
        plan = self.planner.settle(self.planner.plan(view), view, shape)
        slices_s = self.slow_down * plan.finetune_budget_s
        forward_s = self.slow_down * self.planner.predictor.forward_s(shape)
        self.clock.now_s += forward_s + slices_s + self.planner.predictor.overhead_s
        report = SliceReport([SliceTiming(SliceKind.BACKWARD_LAYER, 32, slices_s)])
        overhead_s = self.planner.predictor.overhead_s
        self.planner.observe(IterationSample(shape, forward_s, overhead_s, report, plan))
        left_s = self._free_s = max(self._free_s, self.clock()) + self.front_end_s()
        if self._left_s:
            gaps.append(left_s - self._left_s)
            self._gaps.append(gaps[-1])
        self._left_s = left_s
        return slices_s


def test_a_quiet_front_end_leaves_the_plan_as_it_is():
    attained, trained = Served().run(30)
    assert attained == 1.0
    assert trained == pytest.approx((0.8 * TBT_S - 0.013) / (0.8 * TBT_S))


def test_a_busy_front_end_costs_training_its_time_within_five_seconds_and_gets_it_back():
    rng = random.Random(0)
    served = Served()
    _, before = served.run(30)
    served.front_end_s = lambda: rng.uniform(0.0, 0.06)
    hit, _ = served.run(5)
    assert hit < 0.99
    attained, trained = served.run(120)
    assert attained >= 0.99
    assert 0.1 < trained < before
    served.front_end_s = lambda: 0.001
    served.run(120)
    assert served.run(10)[1] == pytest.approx(before)


def test_a_device_twice_as_slow_is_within_the_target_again_within_five_seconds():
    served = Served()
    served.run(30)
    served.slow_down = 2.0
    assert served.run(5)[0] < 0.9
    attained, trained = served.run(120)
    assert attained >= 0.99
    assert trained > 0.3


def test_a_target_that_the_front_end_never_holds_ends_all_training_but_what_has_aged():
    served = Served()
    served.front_end_s = lambda: 2 * TBT_S
    served.run(5)
    assert served.run(5) == (0.0, 0.0)


def test_one_late_chunk_among_a_hundred_changes_nothing_and_two_do():
    controller = EdgeController(SloConfig(tbt_s=TBT_S), 0.8)
    controller.observe(EdgeReport(100, 0, 0.05), 0.5)
    controller.observe(EdgeReport(10, 1, 0.3), 1.0)
    assert controller.gap_correction_s(1.0) == 0.0
    controller.observe(EdgeReport(10, 1, 0.3), 1.5)
    assert controller.gap_correction_s(1.5) > 0.0


def test_first_tokens_that_come_late_take_slack_but_no_time_from_prompts():
    planner = make_planner(slo=SloConfig(ttft_s=1.0, tbt_s=TBT_S))
    view = IterationView(0.0, num_decode=4, finetune=FineTuneState(last_progress_s=0.0))
    before = planner.settle(planner.plan(view), view, ForwardShape(num_decode=4))
    planner.observe_edge(EdgeReport(num_first=4, num_late_first=4), 0.0)
    after = planner.settle(planner.plan(view), view, ForwardShape(num_decode=4))
    assert after.finetune_budget_s == pytest.approx(0.75 * before.finetune_budget_s)
    assert after.gap_correction_s == 0.0


def test_prompts_keep_half_of_an_iteration_whatever_clients_see():
    planner = make_planner(slack_fraction=1.0)
    for _ in range(10):
        planner.observe_edge(EdgeReport(100, 100, 1.0), 0.0)
    view = IterationView(0.0, num_decode=10, prefills=[PrefillTask("long", 0.0, 2000)])
    plan = planner.plan(view)
    assert plan.gap_correction_s == pytest.approx(TBT_S)
    assert (
        plan.token_budget - 10 == 64
    )  # 50 ms, less 15 ms for those that decode and 1 ms overhead, at 0.5 ms a token


def test_a_minute_of_silence_makes_the_plan_the_predicted_one():
    controller = EdgeController(SloConfig(tbt_s=TBT_S), 0.8)
    controller.observe(EdgeReport(10, 10, 1.0, 5, 5), 10.0)
    assert controller.gap_correction_s(10.0 + FORGET_S) > 0
    assert controller.gap_correction_s(10.1 + FORGET_S) == 0
    assert controller.first_token_share(10.1 + FORGET_S) == 1.0


_COUNTS = st.integers(0, 1000)
_TIMES = st.floats(0, 1e6)


@given(
    st.lists(st.tuples(_COUNTS, _COUNTS, _TIMES, _COUNTS, _COUNTS, st.floats(-100, 1000), _TIMES), max_size=30),
    st.floats(1e-3, 10),
    st.floats(0.01, 1),
)
def test_corrections_stay_within_their_bounds_whatever_is_reported(reports, tbt_s, slack_fraction):
    controller, now_s = EdgeController(SloConfig(tbt_s=tbt_s), slack_fraction), 0.0
    for num_gaps, late, gap_s, num_first, late_first, step_s, iteration_s in reports:
        now_s += step_s
        controller.note_iteration(IterationSample(ForwardShape(num_decode=1), iteration_s))
        before_s = controller.gap_correction_s(now_s)
        controller.observe(
            EdgeReport(num_gaps, min(late, num_gaps), gap_s, num_first, min(late_first, num_first)), now_s
        )
        after_s = controller.gap_correction_s(now_s)
        assert 0.0 <= after_s <= slack_fraction * tbt_s
        assert 0.0 <= controller.first_token_share(now_s) <= 1.0
        assert not late or not num_gaps or after_s >= before_s
        assert before_s - after_s <= 0.05 * slack_fraction * tbt_s
