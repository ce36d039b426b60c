import math

import pytest

from alignment.versions.gate import MAX_CLPD_DROP, WindowScores, accuracy_interval, clpd, judge_candidate
from core.alignment_config import GateConfig
from core.types import PairScore


def score(pair_id, margin, *, gap=None, loss=0.5):
    """`gap` is the CLPD of the pair; by default it follows the margin."""
    gap = 10 * margin if gap is None else gap
    return PairScore(str(pair_id), -20.0 + gap, -20.0, -20.0, -20.0, loss, margin)


def window(candidate, live, name="recent"):
    return WindowScores(
        name,
        [score(i, margin) for i, margin in enumerate(candidate)],
        [score(i, margin) for i, margin in enumerate(live)],
    )


def judge(candidate, live, max_clpd_drop=MAX_CLPD_DROP, **config):
    return judge_candidate([window(candidate, live)], GateConfig(**config), max_clpd_drop)


def test_a_better_candidate_is_accepted_with_its_numbers():
    decision = judge([1.0, 1.0, 1.0, -1.0], [1.0, -1.0, -1.0, -1.0])
    assert decision.accepted
    (recent,) = decision.windows
    assert (recent.candidate_accuracy, recent.live_accuracy) == (0.75, 0.25)
    assert (recent.candidate_clpd, recent.live_clpd) == (5.0, -5.0)
    assert recent.num_pairs == 4
    assert "0.750 (live 0.250)" in decision.reason


def test_an_equal_candidate_is_accepted():
    assert judge([1.0, -1.0], [1.0, -1.0]).accepted


def test_with_few_pairs_one_lost_pair_is_enough_to_refuse():
    decision = judge([1.0] * 9 + [-0.1], [1.0] * 9 + [0.1], max_clpd_drop=100)
    assert not decision.accepted
    assert "preference accuracy fell from 1.000 to 0.900" in decision.reason


def test_with_many_pairs_a_loss_within_the_bound_passes_while_chance_explains_it():
    live = [1.0] * 200
    candidate = [1.0] * 198 + [-1.0] * 2  # McNemar: p = 0.25
    decision = judge(candidate, live, max_clpd_drop=100, confidence=0.95)
    assert "CLPD" in decision.reason
    assert decision.windows[0].p_accuracy == pytest.approx(0.25)
    assert decision.accepted


def test_a_small_but_sure_loss_is_refused():
    """2 % of 1,000 pairs lost and none won is within the bound, and no accident."""
    decision = judge([-1.0] * 20 + [1.0] * 980, [1.0] * 1000, max_accuracy_drop=0.05, max_clpd_drop=100)
    assert not decision.accepted
    assert "significant at 95%" in decision.reason


def test_mcnemar_is_the_exact_binomial_tail():
    scipy_stats = pytest.importorskip("scipy.stats")
    candidate = [-1.0] * 7 + [1.0] * 3 + [1.0] * 30
    live = [1.0] * 7 + [-1.0] * 3 + [1.0] * 30
    p = judge(candidate, live, max_accuracy_drop=1, max_clpd_drop=100).windows[0].p_accuracy
    assert p == pytest.approx(scipy_stats.binomtest(7, 10, 0.5, alternative="greater").pvalue)


def test_a_fall_of_clpd_refuses_though_every_pair_is_still_right():
    live = [score(i, 1.0, gap=8.0 + i % 3) for i in range(40)]
    candidate = [score(i, 1.0, gap=7.7 + i % 3) for i in range(40)]
    decision = judge_candidate([WindowScores("recent", candidate, live)], GateConfig(), max_clpd_drop=1.0)
    assert not decision.accepted
    assert "CLPD fell" in decision.reason
    assert "nats" in decision.reason


def test_noise_in_clpd_alone_does_not_refuse():
    live = [score(i, 1.0, gap=8.0) for i in range(40)]
    candidate = [score(i, 1.0, gap=8.0 + (0.4 if i % 2 else -0.4)) for i in range(40)]
    assert judge_candidate([WindowScores("recent", candidate, live)], GateConfig()).accepted


def test_a_loss_on_old_pairs_refuses_what_is_better_on_recent_ones():
    windows = [window([1.0] * 20, [-1.0] * 20), window([-1.0] * 20, [1.0] * 20, "old")]
    decision = judge_candidate(windows, GateConfig())
    assert not decision.accepted
    assert "old pairs" in decision.reason
    assert decision.num_pairs == 40
    metrics = decision.metrics()
    assert metrics["candidate_accuracy"] == 1.0
    assert metrics["old_candidate_accuracy"] == 0.0
    assert metrics["old_num_pairs"] == 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_scores_that_are_not_finite_refuse(bad):
    decision = judge([1.0, bad], [1.0, 1.0])
    assert not decision.accepted
    assert "not finite" in decision.reason


def test_a_candidate_without_a_score_where_the_live_adapter_has_one_is_refused():
    live = [score(i, 1.0) for i in range(4)]
    decision = judge_candidate([WindowScores("recent", live[:3], live)], GateConfig())
    assert not decision.accepted
    assert "not scored on 1 of 4" in decision.reason


def test_pairs_that_even_the_live_adapter_cannot_score_do_not_count():
    live = [score(0, math.nan), score(1, -1.0)]
    decision = judge_candidate([WindowScores("recent", [score(0, math.nan), score(1, 1.0)], live)], GateConfig())
    assert decision.accepted
    assert decision.num_pairs == 1


def test_without_held_out_pairs_there_is_nothing_to_compare():
    decision = judge_candidate([WindowScores("recent", [], []), WindowScores("old", [], [])], GateConfig())
    assert decision.accepted
    assert "nothing to compare" in decision.reason
    assert decision.metrics() == {"num_pairs": 0}


def test_without_a_live_score_a_candidate_must_still_be_finite():
    candidate = [score(0, math.nan)]
    assert not judge_candidate([WindowScores("recent", candidate, [])], GateConfig()).accepted


def test_clpd_is_the_difference_of_sequence_log_probabilities():
    assert clpd(PairScore("p", -3.0, -10.0, 0.0, 0.0, 0.1, 0.1)) == 7.0


def test_the_interval_is_wilsons():
    low, high = accuracy_interval(9, 10)
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    assert accuracy_interval(0, 0) == (0.0, 1.0)
