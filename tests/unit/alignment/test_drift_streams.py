"""Change detection: what is found, how soon, and what is not taken for a change."""

import json

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from alignment.drift import streams, window
from alignment.drift.change_streams import ChangeStream, LossRise, Row, change_point
from alignment.drift.tracker import ALARM_GAMMA, QUIET_GAMMA, DriftTracker
from core.alignment_config import DriftConfig
from tests.support.drift_pairs import feed, margins, scored

CONFIG = DriftConfig()
DETECTED = ("accuracy", "margin", "loss")


def detections(found, stream="global"):
    return [(seq, event) for seq, event in found if event.stream == stream and event.kind in DETECTED]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flipped", [0.0, 0.1])
def test_a_sudden_change_is_found_within_64_pairs_and_dated(seed, flipped):
    rng = np.random.default_rng(seed)
    tracker = DriftTracker(CONFIG)
    assert detections(feed(tracker, margins(rng, 300, flipped=flipped))) == []
    found = detections(feed(tracker, margins(rng, 64, mean=-3.0, flipped=flipped), start=301))
    assert found
    assert tracker.drifted
    assert tracker.level == 1.0
    assert abs(tracker.last_change_seq - 300) <= 8
    assert "->" in found[0][1].detail


@pytest.mark.parametrize("flipped", [0.0, 0.1])
def test_five_thousand_stationary_pairs_raise_no_detection(flipped):
    for seed in range(2):
        rng = np.random.default_rng(seed)
        stream = ChangeStream(streams.channels(streams.SENSITIVITY), 1024)
        changes = []
        for seq, margin in enumerate(margins(rng, 5000, flipped=flipped)):
            pair = scored(seq, margin)
            changes += stream.update(Row(seq, pair.loss, pair.margin))
        assert changes == []


def test_a_gradual_change_is_found_before_it_is_complete():
    rng = np.random.default_rng(0)
    tracker = DriftTracker(CONFIG)
    feed(tracker, margins(rng, 300))
    share = np.arange(200) / 200
    found = detections(feed(tracker, margins(rng, 200, flipped=share), start=301))
    assert found
    assert found[0][0] <= 450


def test_an_improvement_is_no_alarm_and_the_next_change_is_measured_against_it():
    rng = np.random.default_rng(1)
    tracker = DriftTracker(CONFIG)
    feed(tracker, margins(rng, 200, mean=0.3))
    before = tracker.last_change_seq
    tracker.note_live("v0002")
    found = feed(tracker, margins(rng, 300, mean=3.0), start=201)
    assert detections(found) == []
    assert tracker.last_change_seq == before
    assert not tracker.drifted
    assert tracker.level < 0.1
    assert detections(feed(tracker, margins(rng, 64, mean=0.3), start=501))
    assert abs(tracker.last_change_seq - 500) <= 8


def test_the_recovery_after_a_change_is_no_alarm_and_the_change_back_is_found():
    rng = np.random.default_rng(2)
    tracker = DriftTracker(CONFIG)
    feed(tracker, margins(rng, 200))
    assert detections(feed(tracker, margins(rng, 60, mean=-3), start=201))
    tracker.note_live("v0002")
    assert detections(feed(tracker, margins(rng, 140), start=261)) == []
    assert detections(feed(tracker, margins(rng, 40, mean=-3), start=401))
    assert abs(tracker.last_change_seq - 400) <= 4


def test_a_change_of_one_user_is_seen_on_that_users_stream_only():
    rng = np.random.default_rng(3)
    tracker = DriftTracker(CONFIG)
    found = []
    for seq in range(1, 1201):
        user = f"user{seq % 20}"
        margin = rng.normal(3, 1.3) * (-1 if user == "user7" and seq > 600 else 1)
        found += [(seq, event) for event in tracker.observe(scored(seq, margin, user=user))]
    assert {event.stream for _, event in found if event.kind in DETECTED} == {"user:user7"}
    assert tracker.last_change_seq == 0
    assert tracker.level < 0.2  # its share of the pairs is 1/20


def test_a_tag_that_changes_is_found_and_raises_the_level_by_its_share():
    rng = np.random.default_rng(4)
    tracker = DriftTracker(DriftConfig(min_accuracy=0.01, max_loss=100.0))
    for seq in range(1, 601):
        is_german = seq % 8 == 0
        margin = rng.normal(3, 1.3) * (-1 if seq > 300 and is_german else 1)
        events = tracker.observe(scored(seq, margin, tags={"lang": "de" if is_german else "en"}))
        if events:
            break
    assert [event.stream for event in events] == ["tag:lang=de"]
    assert "(12% of the newest pairs)" in events[0].detail
    assert tracker.level == pytest.approx(1 / 8)
    assert not tracker.drifted


def test_a_hostile_user_who_is_weighted_down_raises_nothing_for_all():
    rng = np.random.default_rng(5)
    tracker = DriftTracker(CONFIG)
    found = []
    for seq in range(1, 801):
        hostile = seq > 300 and seq % 2 == 0
        margin = rng.normal(-6 if hostile else 3, 1.3)
        pair = scored(
            seq, margin, user="mallory" if hostile else "alice", tags={"app": "x"}, weight=0.1 if hostile else 1.0
        )
        found += tracker.observe(pair)
    assert {event.stream for event in found} <= {"user:mallory"}
    assert (tracker.drifted, tracker.last_change_seq) == (False, 0)
    assert tracker.level < 0.1
    assert tracker.to_wire()["streams"]["user:mallory"]["accuracy"] == 0.0


def test_a_user_who_is_weighted_down_later_leaves_the_window_for_good():
    tracker = DriftTracker(CONFIG)
    for seq in range(8):
        tracker.observe(scored(seq, -3.0, user="mallory"))
    assert tracker.complains
    tracker.note_live("v0002")
    for seq in range(8):
        tracker.reweigh(f"p{seq}", 0.1)
        tracker.rescore(f"p{seq}", 3.0, -3.0, "v0002")
    assert (tracker.complains, tracker.unscored_ids) == (False, [])


def test_the_least_recently_updated_stream_is_dropped_first(monkeypatch):
    monkeypatch.setattr(streams, "MAX_STREAMS", 3)
    tracker = DriftTracker(CONFIG)
    for seq, user in enumerate(["a", "b", "c", "a", "d"]):
        tracker.observe(scored(seq, 1.0, user=user))
    assert list(tracker.to_wire()["streams"]) == ["global", "user:d", "user:a", "user:c"]


def test_restarts_in_the_middle_change_no_answer():
    rng = np.random.default_rng(6)
    values = [*margins(rng, 300), *margins(rng, 100, mean=-3.0), *margins(rng, 300), *margins(rng, 100, mean=0.0)]
    prompts = [f"word{rng.integers(0, 30)} " * int(rng.integers(1, 9)) for _ in values]
    whole, parts = DriftTracker(CONFIG), DriftTracker(CONFIG)
    for seq, (margin, prompt) in enumerate(zip(values, prompts, strict=True)):
        if seq in (5, 150, 303, 310, 660):
            parts = DriftTracker.from_state(json.loads(json.dumps(parts.to_state())), CONFIG)
        pair = scored(seq, margin, user=f"u{seq % 2}", prompt=prompt)
        assert whole.observe(pair) == parts.observe(pair)
    assert whole.to_state() == parts.to_state()
    assert whole.to_wire() == parts.to_wire()
    assert whole.last_change_seq > 0


def test_a_restart_of_a_full_stream_changes_no_answer():
    rng = np.random.default_rng(7)
    channels = streams.channels(streams.SENSITIVITY)
    whole = ChangeStream(channels, 64)
    rows = [Row(seq, scored(seq, margin).loss, margin) for seq, margin in enumerate(margins(rng, 200))]
    for row in rows:
        whole.update(row)
        assert len(whole.rows) < 64
    copy = ChangeStream(channels, 64, whole.rows)
    assert copy.rows == whole.rows
    for seq in range(200, 240):
        row = Row(seq, 3.0, -3.0)
        assert whole.update(row) == copy.update(row)
    assert whole.rows == copy.rows
    assert whole.rows[0].seq == 200


def test_the_split_of_least_squares_dates_a_change():
    assert change_point([0, 0, 0, 1, 1]) == 3
    assert change_point([1, 0]) == 1
    assert change_point([5, 5, 5, 5, 5, 1]) == 5


def test_no_single_loss_raises_an_alarm():
    test = LossRise(streams.SENSITIVITY.page_hinkley_threshold)
    assert not any(test(0.1) for _ in range(100))
    assert not test(1e5)
    assert not any(test(0.1) for _ in range(100))


@pytest.mark.parametrize("threshold", [1e-3, 1e6])
def test_an_extreme_threshold_does_not_overflow(threshold):
    test = LossRise(threshold)
    assert [test(value) for value in (0.0, 1e300, -1e300)] == [False, False, False]


@pytest.fixture(scope="module")
def two_streams():
    """Few streams and a short minimum, for every example alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "MAX_STREAMS", 2)
        patch.setattr(window, "MIN_PAIRS", 4)
        yield


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.lists(
        st.tuples(
            st.floats(),
            st.floats(),
            st.floats() | st.sampled_from([0.0, 0.5, 1.0]),
            st.sampled_from([None, "a", "b", "x" * 1000]),
        ),
        max_size=60,
    )
)
@pytest.mark.usefixtures("two_streams")
def test_whatever_comes_in_the_state_stays_bounded_finite_and_restorable(rows):
    config = DriftConfig(window=8)
    tracker = DriftTracker(config)
    for seq, (loss, margin, weight, user) in enumerate(rows):
        pair = scored(seq, 0.0, user=user, weight=weight)
        tracker.observe(
            type(pair)(pair.pair_id, seq, loss, margin, pair.prompt, user, {"tag": "\x00" * 300}, weight, 0.0)
        )
        assert 0.0 <= tracker.level <= 1.0
        assert config.quiet_rate <= tracker.retrain_rate <= config.alarm_rate
        assert QUIET_GAMMA <= tracker.gamma_factor <= ALARM_GAMMA
    state = tracker.to_state()
    text = json.dumps(state, allow_nan=False)
    assert len(text) < 100_000  # 22 KB of it for the mean prompt
    assert DriftTracker.from_state(json.loads(text), config).to_state() == state
    json.dumps(tracker.to_wire(), allow_nan=False)
    assert len(tracker.to_wire()["streams"]) <= 3
