"""Input drift: the prompts get longer, shorter, or turn to another topic."""

import time

import numpy as np
import pytest

from alignment.drift.input_drift import InputDrift
from alignment.drift.tracker import DriftTracker
from core.alignment_config import DriftConfig
from tests.support.drift_pairs import asked, scored

CONFIG = DriftConfig()


def kinds(drift, prompts, start=0):
    return [
        change.channel.kind for seq, text in enumerate(prompts, start) for _, change in drift.update(seq, text)
    ]


@pytest.mark.parametrize("seed", range(2))
def test_another_topic_is_found(seed):
    rng = np.random.default_rng(seed)
    drift = InputDrift()
    assert kinds(drift, [asked(rng, "cooking") for _ in range(300)]) == []
    assert "prompt_novelty" in kinds(drift, [asked(rng, "code") for _ in range(128)], start=300)


@pytest.mark.parametrize("num_words", [4, 60])
def test_another_length_is_found_in_either_direction(num_words):
    rng = np.random.default_rng(0)
    drift = InputDrift()
    kinds(drift, [asked(rng, "cooking", int(rng.integers(10, 20))) for _ in range(300)])
    changes = kinds(drift, [asked(rng, "cooking", num_words) for _ in range(128)], start=300)
    assert "prompt_length" in changes


def test_stationary_prompts_raise_nothing():
    rng = np.random.default_rng(1)
    prompts = [asked(rng, rng.choice(["cooking", "code"]), int(rng.integers(6, 40))) for _ in range(1200)]
    assert kinds(InputDrift(), prompts) == []


def test_input_drift_raises_the_level_to_a_half_and_is_no_alarm():
    tracker = DriftTracker(CONFIG)
    rng = np.random.default_rng(2)
    for seq in range(300):
        tracker.observe(scored(seq, 3.0, prompt=asked(rng, "cooking")))
    events = []
    for seq in range(300, 428):
        events += tracker.observe(scored(seq, 3.0, prompt=asked(rng, "code", 80)))
        if events:
            break
    assert events[0].stream == "prompts"
    assert "input only" in events[0].detail
    assert (tracker.level, tracker.drifted) == (0.5, False)
    assert tracker.to_wire()["prompts"]["last_event"]["kind"] == events[0].kind


def test_prompts_of_distrusted_pairs_are_not_looked_at():
    tracker = DriftTracker(CONFIG)
    for seq in range(50):
        tracker.observe(scored(seq, 3.0, prompt="x", weight=0.0))
    assert tracker.to_wire()["prompts"]["num_prompts"] == 0


@pytest.mark.parametrize("prompt", ["", " \n", "日本語の文", "\x00", "word " * 50_000])
def test_odd_prompts_are_taken(prompt):
    drift = InputDrift()
    assert kinds(drift, [prompt] * 40) == []
    assert 0.0 <= drift.to_wire()["mean_novelty"] <= 1.0


def test_a_pair_costs_little_with_all_streams_in_use():
    """The bound is ten times the measured mean (0.4 ms); see docs/measurements/drift_detection.md."""
    tracker, rng = DriftTracker(CONFIG), np.random.default_rng(3)
    pairs = [
        scored(
            seq, rng.normal(3, 1.3), user=f"u{seq % 180}", tags={"app": f"a{seq % 20}"}, prompt=asked(rng, "code")
        )
        for seq in range(1000)
    ]
    for pair in pairs[:500]:
        tracker.observe(pair)
    begin_s = time.process_time()
    for pair in pairs[500:]:
        tracker.observe(pair)
    assert (time.process_time() - begin_s) / 500 < 4e-3
