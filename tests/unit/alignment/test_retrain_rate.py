"""Level to rate, and the credit of training slots."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.drift import tracker
from alignment.drift.tracker import TrainingCredit, interpolate


def test_the_rate_is_geometric_between_quiet_and_alarm_and_linear_from_zero():
    assert [interpolate(0.25, 4.0, level) for level in (0, 0.5, 1)] == pytest.approx([0.25, 1.0, 4.0])
    assert [interpolate(0.0, 2.0, level) for level in (0, 0.5, 1)] == pytest.approx([0.0, 1.0, 2.0])


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats())
def test_the_rate_stays_between_its_bounds(quiet, alarm, level):
    value = interpolate(quiet, alarm, level)
    slack = 1e-9 * max(quiet, alarm)
    assert min(quiet, alarm) - slack <= value <= max(quiet, alarm) + slack


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_alarm_never_means_a_lower_rate(one, other):
    low, high = sorted((one, other))
    assert interpolate(0.25, 4.0, low) <= interpolate(0.25, 4.0, high) * (1 + 1e-12)


def test_fractions_add_up_to_whole_slots():
    credit = TrainingCredit()
    for _ in range(10):
        assert credit.spend(5) == 0
        credit.earn(1, 0.1)
    assert credit.spend(5) == 1
    assert credit.balance == pytest.approx(0.0)


def test_no_more_is_granted_than_earned_or_asked_for():
    credit = TrainingCredit()
    credit.earn(4, 2.0)
    assert [credit.spend(5), credit.spend(5), credit.spend(5), credit.spend(-3)] == [5, 3, 0, 0]


def test_the_balance_is_bounded(monkeypatch):
    monkeypatch.setattr(tracker, "MAX_SLOTS", 10)
    credit = TrainingCredit()
    credit.earn(1000, 4.0)
    assert credit.balance == 10
    credit.top_up(1000)
    credit.refund(1000)
    assert credit.balance == 10


def test_topping_up_twice_grants_one_pass():
    credit = TrainingCredit()
    credit.earn(1, 2.0)
    credit.top_up(8)
    credit.top_up(8)
    assert credit.balance == 8


def test_what_is_no_number_earns_nothing():
    credit = TrainingCredit()
    for rate in (math.nan, math.inf, -1.0):
        credit.earn(3, rate)
    assert credit.balance == 0


def test_the_credit_survives_a_restart_also_with_a_smaller_bound(monkeypatch):
    credit = TrainingCredit()
    credit.earn(3, 2.5)
    state = json.loads(json.dumps(credit.to_state()))
    assert TrainingCredit.from_state(state).balance == 7.5
    monkeypatch.setattr(tracker, "MAX_SLOTS", 4)
    assert TrainingCredit.from_state(state).balance == 4


@given(
    st.lists(st.tuples(st.sampled_from(["earn", "spend", "top_up", "refund"]), st.integers(-5, 400)), max_size=40)
)
def test_the_balance_never_leaves_its_bounds(steps):
    credit = TrainingCredit()
    for name, number in steps:
        if name == "earn":
            credit.earn(number, 0.7)
        else:
            getattr(credit, name)(number)
        assert 0 <= credit.balance <= 256
