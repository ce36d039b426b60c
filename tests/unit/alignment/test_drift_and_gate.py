"""Drift over a window of scores, and the gate on held-out pairs."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.drift import DriftWindow
from alignment.gate import accuracy_interval, judge_candidate
from core.config import DriftConfig, GateConfig
from core.types import PairScore

CONFIG = DriftConfig(window=10, min_pairs=4, min_accuracy=0.75, max_loss=0.55)


def filled(*scores, config=CONFIG):
    window = DriftWindow(config)
    for loss, margin in scores:
        window.update(loss, margin)
    return window


def test_too_few_pairs_are_no_drift():
    window = filled(*[(0.7, -1.0)] * 3)
    assert not window.drifted
    assert window.reason == "3 of 4 pairs needed"
    assert DriftWindow(CONFIG).accuracy is None
    assert DriftWindow(CONFIG).mean_loss is None


def test_low_accuracy_is_drift_and_says_so():
    window = filled((0.1, 1.0), (0.1, 1.0), (0.1, -1.0), (0.1, -1.0))
    assert window.drifted
    assert window.accuracy == 0.5
    assert window.reason == "preference accuracy 0.50 is below 0.75 over 4 pairs"


def test_a_high_loss_alone_is_drift():
    window = filled(*[(0.69, 0.001)] * 4)
    assert window.drifted
    assert "mean DPO loss 0.690 is above 0.550" in window.reason


def test_the_untrained_adapter_with_margins_of_zero_has_drifted():
    assert filled(*[(math.log(2), 0.0)] * 4).accuracy == 0.0


def test_an_adapter_that_agrees_has_not_drifted_and_a_new_one_starts_afresh():
    window = filled(*[(0.2, 2.0)] * 10)
    assert not window.drifted
    assert (window.accuracy, window.mean_loss, window.mean_margin) == (1.0, pytest.approx(0.2), 2.0)
    window.reset()
    assert (window.num_pairs, window.drifted) == (0, False)


def test_old_scores_leave_the_window():
    window = filled(*[(0.7, -1.0)] * 10, *[(0.1, 1.0)] * 10)
    assert (window.num_pairs, window.drifted, window.accuracy) == (10, False, 1.0)


def test_scores_that_are_not_finite_are_counted_and_ignored():
    window = filled((math.nan, 1.0), (0.1, math.inf), (0.1, 1.0))
    assert (window.num_pairs, window.num_ignored) == (1, 2)


def test_a_window_smaller_than_min_pairs_still_reports():
    assert filled(*[(0.7, -1.0)] * 4, config=DriftConfig(window=4, min_pairs=100)).drifted


@given(st.lists(st.tuples(st.floats(), st.floats() | st.just(1.7e308)), max_size=30))
def test_the_state_survives_json(scores):
    window = filled(*scores)
    copy = DriftWindow.from_dict(json.loads(json.dumps(window.to_dict())), CONFIG)
    assert copy.to_dict() == window.to_dict()
    assert (copy.drifted, copy.reason, copy.accuracy) == (window.drifted, window.reason, window.accuracy)


def scores(*margins, loss=0.5):
    return [PairScore(f"p{i}", 0.0, 0.0, 0.0, 0.0, loss, margin) for i, margin in enumerate(margins)]


def test_without_held_out_pairs_a_candidate_is_accepted_and_says_why():
    decision = judge_candidate([], [], GateConfig())
    assert decision.accepted
    assert decision.reason == "no held-out pairs yet"
    assert decision.num_pairs == 0


def test_a_better_or_equal_candidate_is_accepted():
    live = scores(1.0, -1.0, 0.5)
    for candidate in (live, scores(2.0, 0.1, 0.5)):
        decision = judge_candidate(reversed(candidate), live, GateConfig())
        assert decision.accepted, decision.reason
        assert decision.num_pairs == 3
    assert decision.candidate_accuracy == 1.0
    assert decision.live_accuracy == pytest.approx(2 / 3)
    assert decision.to_wire()["candidate_accuracy_interval"][0] < 0.5


def test_a_fall_in_accuracy_or_margin_beyond_the_allowance_is_refused():
    live = scores(1.0, 1.0, 1.0, 1.0)
    less_right = scores(9.0, 9.0, 9.0, -1.0)
    less_sure = scores(0.9, 0.9, 0.9, 0.9)
    assert "accuracy fell from 1.000 to 0.750" in judge_candidate(less_right, live, GateConfig()).reason
    assert "margin fell from 1.0000 to 0.9000" in judge_candidate(less_sure, live, GateConfig()).reason
    assert not judge_candidate(less_right, live, GateConfig(max_margin_drop=9)).accepted
    assert not judge_candidate(less_sure, live, GateConfig(max_accuracy_drop=1)).accepted
    assert judge_candidate(less_right, live, GateConfig(max_accuracy_drop=0.25)).accepted
    assert judge_candidate(less_sure, live, GateConfig(max_margin_drop=0.1)).accepted


def test_a_candidate_with_missing_or_infinite_scores_is_refused():
    live = scores(1.0, 1.0)
    assert "not scored on 1 of 2" in judge_candidate(scores(5.0), live, GateConfig()).reason
    for bad in (math.nan, math.inf):
        for with_live in (live, []):
            decision = judge_candidate(scores(bad, 1.0), with_live, GateConfig())
            assert (decision.accepted, "not finite" in decision.reason) == (False, True)


def test_pairs_that_the_live_adapter_could_not_score_do_not_count():
    assert judge_candidate(scores(1.0, 1.0), scores(math.nan, 1.0), GateConfig()).num_pairs == 1
    assert judge_candidate(scores(1.0), [], GateConfig()).accepted


def test_the_interval_is_wilsons():
    assert accuracy_interval(0, 0) == (0.0, 1.0)
    assert accuracy_interval(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert accuracy_interval(10, 10) == (pytest.approx(0.7225, abs=1e-4), pytest.approx(1.0))
