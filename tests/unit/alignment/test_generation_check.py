import math

import pytest

from alignment.versions.gate import pairs_to_score, repetition, report_generation
from core.alignment_config import GateConfig
from core.types import PairScore

GATE = GateConfig(max_kl=2.0)
LIVE = [list(range(20)), list(range(30))]


def scores(pairs, excess_per_token):
    return [PairScore(p.pair_id, -1.0 + excess_per_token * len(p.chosen_ids), 0, -1.0, 0, 0.5, 0.0) for p in pairs]


def report(candidate, excess=0.5, live=LIVE):
    scored = pairs_to_score([[1, 2]] * len(candidate), candidate, 1000)
    return report_generation(candidate, live, scored, scores(scored, excess))


def test_like_answers_pass():
    found = report([list(range(18)), list(range(33))])
    assert found.problems(GATE) == []
    assert found.generation_kl == pytest.approx(0.5)
    assert found.metrics()["generation_kl"] == pytest.approx(0.5)


def test_silence_is_a_collapse():
    assert "tokens long" in report([[], []]).problems(GATE)[0]


def test_endless_answers_are_a_collapse():
    assert "tokens long" in report([list(range(200)), list(range(200))]).problems(GATE)[0]


def test_repetition_is_a_collapse():
    (problem,) = report([[7, 8] * 10, [7, 8] * 15]).problems(GATE)
    assert "repetitions" in problem


def test_distance_from_the_reference_is_bounded():
    (problem,) = report(LIVE, excess=2.5).problems(GATE)
    assert "KL to the reference is 2.50" in problem


@pytest.mark.parametrize("excess", [math.nan, math.inf])
def test_a_kl_that_is_no_number_is_no_excuse(excess):
    assert any("KL" in problem for problem in report(LIVE, excess=excess).problems(GATE))


def test_short_answers_of_one_and_three_tokens_are_alike():
    assert report([[5], [6]], live=[[5, 6, 7], [5, 6, 7]]).problems(GATE) == []


def test_repetition_counts_trigrams_within_one_answer():
    assert repetition([[1, 2, 3], [1, 2, 3]]) == 0.0
    assert repetition([[1, 2, 3, 1, 2, 3]]) == pytest.approx(1 / 4)
    assert repetition([[1], []]) == 0.0


def test_pairs_to_score_fit_the_length_and_never_compare_a_token_with_itself():
    pairs = pairs_to_score([[9] * 8, [9], [9]], [[0, 3, 4], [1, 0], []], max_length_tokens=10)
    assert [pair.chosen_ids for pair in pairs] == [(0, 3), (1, 0)]
    assert [pair.rejected_ids for pair in pairs] == [(1,), (0,)]
