"""The tracker: level window, level of alarm, change of the live version."""

import json
import math

import pytest

from alignment.drift import tracker as drift_tracker
from alignment.drift import window
from alignment.drift.tracker import DriftTracker
from core.alignment_config import DriftConfig
from tests.support.drift_pairs import feed, scored

CONFIG = DriftConfig(window=10, min_accuracy=0.75, max_loss=0.55)


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    """Small constants make short streams."""
    monkeypatch.setattr(window, "MIN_PAIRS", 4)
    monkeypatch.setattr(drift_tracker, "HALF_LIFE_PAIRS", 10)


def filled(*values, config=CONFIG):
    tracker = DriftTracker(config)
    feed(tracker, values)
    return tracker


def test_too_few_pairs_are_no_drift():
    tracker = filled(-1.0, -1.0, -1.0)
    assert not tracker.drifted
    assert tracker.reason == "3 of 4 pairs needed"
    assert DriftTracker(CONFIG).to_wire()["accuracy"] is None


def test_low_accuracy_is_drift_and_says_so():
    tracker = filled(2.0, 2.0, -0.1, -0.1)
    assert tracker.drifted
    assert (tracker.level, tracker.retrain_rate, tracker.gamma_factor) == (
        1.0,
        CONFIG.alarm_rate,
        drift_tracker.ALARM_GAMMA,
    )
    assert tracker.reason == "preference accuracy 0.50 is below 0.75 over 4 pairs"


def test_a_high_loss_alone_is_drift():
    tracker = filled(*[0.001] * 4)
    assert tracker.drifted
    assert "mean DPO loss 0.693 is above 0.550" in tracker.reason


def test_the_untrained_adapter_with_margins_of_zero_has_drifted():
    assert filled(*[0.0] * 4).to_wire()["accuracy"] == 0.0


def test_an_adapter_that_agrees_is_quiet():
    tracker = filled(*[2.0] * 500)
    assert not tracker.drifted
    assert tracker.level == pytest.approx(0.0, abs=1e-3)
    assert tracker.retrain_rate == pytest.approx(CONFIG.quiet_rate, rel=0.01)
    assert tracker.reason == f"the live adapter agrees with the newest {CONFIG.window} pairs"


def test_before_anything_is_known_the_first_pairs_count_as_an_alarm():
    tracker = DriftTracker(CONFIG)
    assert (tracker.drifted, tracker.level) == (False, 1.0)


def test_a_window_smaller_than_min_pairs_still_reports(monkeypatch):
    monkeypatch.setattr(window, "MIN_PAIRS", 100)
    assert filled(*[-1.0] * 4, config=DriftConfig(window=4)).drifted


def test_the_level_halves_with_every_half_life_of_agreeing_pairs():
    tracker = filled(*[-1.0] * 4)
    seq = 5
    while tracker.complains:
        tracker.observe(scored(seq, 3.0))
        seq += 1
    first = tracker.level
    for more in range(10):
        tracker.observe(scored(seq + more, 3.0))
    assert tracker.level == pytest.approx(first / 2)
    assert not tracker.drifted


def test_a_complaint_is_one_event_however_long_it_lasts():
    tracker = DriftTracker(CONFIG)
    kinds = [event.kind for _, event in feed(tracker, [-1.0] * 15)]
    assert kinds.count("window") == 1


def test_a_new_live_version_voids_the_window_until_its_pairs_are_scored_again():
    tracker = filled(*[-1.0] * 12)
    tracker.note_live("v0002")
    assert not tracker.drifted
    assert tracker.unscored_ids == [f"p{seq}" for seq in range(12, 2, -1)]
    for pair_id in tracker.unscored_ids:
        tracker.rescore(pair_id, 0.1, 2.2, "v0002")
    state = tracker.to_wire()
    assert (state["accuracy"], state["num_pairs"], state["drifted"]) == (1.0, 10, False)
    assert tracker.unscored_ids == []
    assert tracker.level == pytest.approx(0.5 * 0.5**0.6)  # answered by the fourth score; ten are a half-life


def test_a_new_version_that_is_no_better_keeps_the_alarm():
    tracker = filled(*[-1.0] * 12)
    tracker.note_live("v0002")
    for pair_id in tracker.unscored_ids:
        tracker.rescore(pair_id, 1.3, -1.0, "v0002")
    assert (tracker.drifted, tracker.level) == (True, 1.0)


def test_scores_of_a_version_that_is_not_live_do_not_count():
    tracker = filled(*[2.0] * 10)
    tracker.note_live("v0002")
    tracker.rescore("p10", 3.0, -3.0, "v0001")
    assert len(tracker.unscored_ids) == 10
    tracker.note_live("v0002")  # said again: nothing is lost
    tracker.rescore("p10", 0.1, 3.0, "v0002")
    tracker.note_live("v0002")
    assert len(tracker.unscored_ids) == 9


def test_pairs_that_a_new_tracker_does_not_know_fill_its_window_as_the_oldest():
    tracker = DriftTracker(CONFIG)
    tracker.note_live("v0001")
    for seq in range(4):
        tracker.rescore(f"old{seq}", 3.0, -3.0, "v0001")
    assert tracker.complains
    feed(tracker, [3.0] * 10)
    assert not tracker.complains


def test_a_pair_that_comes_twice_counts_once():
    tracker = filled(2.0, 2.0)
    tracker.observe(scored(2, 2.0))
    assert tracker.to_wire()["streams"]["global"]["num_pairs"] == 2


def test_scores_that_are_not_finite_are_counted_and_ignored():
    tracker = DriftTracker(CONFIG)
    for seq, margin in enumerate([math.nan, math.inf, -1e9]):
        assert tracker.observe(scored(seq, margin)) == []
    tracker.observe(scored(9, 1.0))
    tracker.note_live("v1")
    tracker.rescore("p9", math.nan, 1.0, "v1")
    assert (tracker.to_wire()["num_ignored"], tracker.to_wire()["streams"]["global"]["num_pairs"]) == (4, 1)


def test_an_alarm_that_the_window_does_not_share_ends_when_a_new_version_has_been_scored(monkeypatch):
    config = DriftConfig(window=10, min_accuracy=0.01, max_loss=100.0)
    monkeypatch.setattr(drift_tracker, "HALF_LIFE_PAIRS", 1e6)
    tracker = DriftTracker(config)
    feed(tracker, [3.0] * 100)
    feed(tracker, [*[-3.0] * 5, 3.0], start=101)
    assert not tracker.complains
    assert tracker.drifted
    assert "HDDM_A: mean accuracy 1.00 -> 0.00" in tracker.reason
    tracker.note_live("v0002")
    assert tracker.drifted
    for pair_id in tracker.unscored_ids[:4]:
        tracker.rescore(pair_id, 0.1, 3.0, "v0002")
    assert not tracker.drifted


def test_what_users_wanted_before_a_change_leaves_the_window():
    tracker = DriftTracker(CONFIG)
    feed(tracker, [3.0] * 100)
    feed(tracker, [-3.0] * 5, start=101)
    assert tracker.last_change_seq == 100
    assert tracker.to_wire()["accuracy"] == 0.0
    tracker.note_live("v0002")
    assert sorted(tracker.unscored_ids) == [f"p{seq}" for seq in range(101, 101 + len(tracker.unscored_ids))]


def test_a_change_around_the_change_of_the_live_version_says_so():
    tracker = DriftTracker(CONFIG)
    feed(tracker, [3.0] * 100)
    tracker.note_live("v0007")
    details = [event.detail for _, event in feed(tracker, [-3.0] * 10, start=101) if event.kind == "accuracy"]
    assert details[0].endswith("; v0007 went live meanwhile")


def test_a_smaller_window_after_a_restart_keeps_the_newest_pairs():
    state = json.loads(json.dumps(filled(*[-1.0] * 6, *[2.0] * 4).to_state()))
    tracker = DriftTracker.from_state(state, DriftConfig(window=4))
    assert tracker.to_wire()["accuracy"] == 1.0


@pytest.mark.parametrize("damage", [{"level": None}, {"level": "x"}, {"last_seq": [1]}])
def test_a_damaged_state_is_refused(damage):
    state = {**filled(1.0).to_state(), **damage}
    with pytest.raises((TypeError, ValueError)):
        DriftTracker.from_state(state, CONFIG)
