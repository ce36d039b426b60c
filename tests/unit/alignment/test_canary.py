"""The verdict on a canary."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.versions.canary import Arm, Share, judge_canary, least_drop
from core.alignment_config import VersionsConfig

CONFIG = VersionsConfig(canary_share=0.1)


def arm(up=0, rated=0, within=0, served=0):
    return Arm(Share(up, rated), Share(within, served))


@pytest.mark.parametrize(
    ("first", "second", "low"),
    # Newcombe 1998, table II, method 10, two-sided 95 %
    [
        ((56, 70), (48, 80), 0.0524),
        ((9, 10), (3, 10), 0.1705),
        ((6, 7), (2, 7), 0.0582),
        ((5, 56), (0, 29), -0.0381),
        ((0, 10), (0, 20), -0.1611),
        ((10, 10), (0, 20), 0.6791),
    ],
)
def test_the_bound_of_a_difference_is_the_published_one(first, second, low):
    assert least_drop(Share(*second), Share(*first), 0.975) == pytest.approx(low, abs=5e-5)


@pytest.mark.parametrize(
    ("canary", "live", "elapsed_s", "action"),
    [
        (arm(), arm(), 10, "wait"),
        (arm(19, 19, 60, 60), arm(100, 100, 600, 600), 10, "wait"),  # one rating is missing
        (arm(20, 20, 49, 49), arm(100, 100, 600, 600), 10, "wait"),
        (arm(17, 20, 50, 50), arm(90, 100, 600, 600), 10, "promote"),
        (arm(8, 20, 50, 50), arm(90, 100, 600, 600), 10, "roll_back"),
        (arm(8, 20, 0, 0), arm(90, 100, 600, 600), 10, "roll_back"),  # worse already
        (arm(1, 10, 0, 0), arm(90, 100, 600, 600), 10, "wait"),  # too few to say, and there is time
        (arm(1, 10, 0, 0), arm(90, 100, 600, 600), 3600, "roll_back"),
        (arm(0, 0, 80, 100), arm(0, 0, 900, 900), 10, "roll_back"),
        (
            arm(20, 20, 97, 100),
            arm(20, 20, 899, 900),
            10,
            "promote",
        ),  # less, but not by more than allowed for sure
        (arm(0, 0, 100, 100), arm(0, 0, 900, 900), 3599, "wait"),
        (arm(0, 0, 100, 100), arm(0, 0, 900, 900), 3600, "promote"),
        (arm(), arm(), 3600, "promote"),
    ],
)
def test_the_verdict(canary, live, elapsed_s, action):
    verdict = judge_canary(canary, live, elapsed_s, CONFIG)
    assert verdict.action == action, verdict.reason
    assert verdict.reason


def test_the_reason_names_the_numbers():
    reason = judge_canary(arm(8, 20, 50, 50), arm(90, 100, 600, 600), 10, CONFIG).reason
    assert reason == "worse than live at 95%: thumbs up 8 of 20 (live 90 of 100)"


shares = st.integers(1, 300).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@given(shares, shares)
def test_a_canary_that_is_as_good_is_never_rolled_back(canary, live):
    better = Share(canary[1], canary[1])
    assert judge_canary(Arm(better, better), Arm(Share(*live), Share(*live)), 1e9, CONFIG).action == "promote"
    drop = least_drop(Share(*canary), Share(*live), 0.95)
    assert drop <= live[0] / live[1] - canary[0] / canary[1] + 1e-12  # a lower bound, whatever the data


def test_equal_versions_are_rolled_back_as_rarely_as_the_confidence_says():
    rng = random.Random(7)

    def draw(total):
        return Share(sum(rng.random() < 0.8 for _ in range(total)), total)

    runs = 4000
    wrong = sum(
        judge_canary(Arm(draw(30), Share()), Arm(draw(270), Share()), 10, CONFIG).action == "roll_back"
        for _ in range(runs)
    )
    assert wrong / runs < 0.065  # 5 % and what is left to chance
