import math

import pytest

from alignment.versions.gate import (
    chosen_answers,
    generation_tokens,
    pairs_to_score,
    repetition,
    report_generation,
)
from core.alignment_config import GateConfig
from core.types import PairScore, TokenizedPair

GATE = GateConfig(max_kl=2.0)
LIVE = [list(range(20)), list(range(30))]


def scores(pairs, excess_per_token):
    return [PairScore(p.pair_id, -1.0 + excess_per_token * len(p.chosen_ids), 0, -1.0, 0, 0.5, 0.0) for p in pairs]


def chosen(lengths, rejected=60, surprise=1.0):
    """Held-out pairs whose chosen answers have these lengths, `surprise` nats per token from the reference."""
    pairs = [TokenizedPair(f"p{i}", (1,), tuple(range(n)), (0,) * rejected) for i, n in enumerate(lengths)]
    of_chosen = [PairScore(pair.pair_id, -1.0, 0, -surprise * len(pair.chosen_ids), 0, 0.5, 0.0) for pair in pairs]
    return chosen_answers(pairs, of_chosen)


LIKE_LIVE = chosen([20, 24, 26, 30])


def report(candidate, excess=0.5, live=LIVE, chosen=LIKE_LIVE):
    scored = pairs_to_score([[1, 2]] * len(candidate), candidate, 1000)
    return report_generation(candidate, live, scored, scores(scored, excess), chosen)


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


LONG = [list(range(64))] * 4


@pytest.mark.parametrize(("length", "passes"), [(16, True), (30, True), (9, True), (2, False), (500, False)])
def test_answers_may_be_as_short_as_people_chose_them(length, passes):
    asked_for = chosen([14, 15, 16, 17, 18])
    problems = report([list(range(length))] * 4, live=LONG, chosen=asked_for).problems(GATE)
    assert (problems == []) == passes
    if length == 2:
        assert problems == ["answers are 2.0 tokens long (live 64.0; people chose 16.0 [14.0, 18.0] over 60.0)"]


def test_short_answers_that_nobody_chose_are_still_a_collapse():
    assert "tokens long" in report([list(range(16))] * 4, live=LONG, chosen=chosen([60, 64, 66])).problems(GATE)[0]


def test_answers_may_be_as_long_as_people_chose_them():
    asked_for = chosen([100, 110, 120])
    assert report([list(range(105))] * 2, chosen=asked_for).problems(GATE) == []
    assert "tokens long" in report([list(range(105))] * 2).problems(GATE)[0]


def test_few_chosen_answers_bound_the_length_less_than_many():
    few, many = chosen([10, 30]), chosen([10, 30] * 20)
    assert few.length == many.length == 20
    assert few.length_interval[0] < many.length_interval[0] < 20 < many.length_interval[1] < few.length_interval[1]
    assert chosen([20]).length_interval == (20, 20)


def test_silence_is_a_collapse_however_few_people_spoke():
    assert "tokens long" in report([[], []], live=LONG[:2], chosen=chosen([10, 30])).problems(GATE)[0]


def test_answers_may_repeat_what_chosen_ones_repeat():
    lists = [TokenizedPair("p", (1,), (7, 8) * 12, (1,))]
    asked_for = chosen_answers(lists, [PairScore("p", -1.0, 0, -24.0, 0, 0.5, 0.0)])
    assert report([[7, 8] * 10, [7, 8] * 15], chosen=asked_for).problems(GATE) == []


def test_the_distance_may_be_as_large_as_that_of_chosen_answers():
    assert report(LIVE, excess=2.5, chosen=chosen([20, 24, 26, 30], surprise=2.6)).problems(GATE) == []
    assert (
        "allowed 2.4" in report(LIVE, excess=2.5, chosen=chosen([20, 24, 26, 30], surprise=2.4)).problems(GATE)[0]
    )


@pytest.mark.parametrize(("longest", "limit"), [(10, 64), (80, 120), (1000, 256)])
def test_answers_are_cut_off_behind_the_longest_chosen_one(longest, limit):
    pairs = [TokenizedPair("p", (1,), tuple(range(longest)), (1,))]
    assert generation_tokens(pairs) == limit
    assert chosen([longest]).length == min(longest, limit)


def test_a_manifest_shows_what_people_chose():
    assert report(LIVE).metrics()["chosen_rejected_length"] == 60


def test_repetition_counts_trigrams_within_one_answer():
    assert repetition([[1, 2, 3], [1, 2, 3]]) == 0.0
    assert repetition([[1, 2, 3, 1, 2, 3]]) == pytest.approx(1 / 4)
    assert repetition([[1], []]) == 0.0


def test_pairs_to_score_fit_the_length_and_never_compare_a_token_with_itself():
    pairs = pairs_to_score([[9] * 8, [9], [9]], [[0, 3, 4], [1, 0], []], max_length_tokens=10)
    assert [pair.chosen_ids for pair in pairs] == [(0, 3), (1, 0)]
    assert [pair.rejected_ids for pair in pairs] == [(1,), (0,)]
