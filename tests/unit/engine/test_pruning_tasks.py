"""The texts on which KV pruning is judged."""

import random
import re

import pytest

from engine.pruning.tasks import first_sentence, is_right, make_passage, make_recall


def count_words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("kind", ["needle", "qa"])
@pytest.mark.parametrize("context_tokens", [200, 512, 1024])
def test_every_question_is_answered_by_the_context_exactly_once(kind, context_tokens):
    for seed in range(20):
        recall = make_recall(kind, context_tokens, 4, count_words, random.Random(seed))
        assert len({question.text for question in recall.questions}) == 4
        for question in recall.questions:
            assert recall.context.count(question.cue + " ") == 1
            assert f"{question.cue} {question.answer}." in recall.context


@pytest.mark.parametrize("kind", ["needle", "qa"])
def test_a_context_is_as_long_as_asked_for_but_for_a_sentence(kind):
    for seed in range(20):
        recall = make_recall(kind, 400, 4, count_words, random.Random(seed))
        assert 380 <= count_words(recall.context) <= 400


def test_the_same_seed_gives_the_same_text():
    made = [make_recall("qa", 300, 4, count_words, random.Random(7)) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0] != make_recall("qa", 300, 4, count_words, random.Random(8))


@pytest.mark.parametrize("kind", ["needle", "qa"])
def test_answers_stand_all_over_the_context(kind):
    depths = []
    for seed in range(60):
        recall = make_recall(kind, 500, 4, count_words, random.Random(seed))
        depths += [recall.context.index(q.cue + " ") / len(recall.context) for q in recall.questions]
    quarters = [sum(low <= depth < low + 0.25 for depth in depths) for low in (0, 0.25, 0.5, 0.75)]
    assert min(quarters) > len(depths) / 8


def test_candidates_count_the_different_answers_of_one_form():
    recall = make_recall("needle", 300, 4, count_words, random.Random(0))
    words = set(re.findall(r"code word of \w+ is (\w+)", recall.context))
    assert {question.num_candidates for question in recall.questions} == {len(words)}
    recall = make_recall("qa", 300, 6, count_words, random.Random(0))
    drinks = set(re.findall(r"drinks (\w+)", recall.context))
    asked = [question for question in recall.questions if "drink" in question.text]
    assert asked
    assert {question.num_candidates for question in asked} == {len(drinks)}


def test_a_passage_goes_on_with_facts_of_its_context():
    context, continuation = make_passage(400, 96, count_words, random.Random(3))
    assert count_words(continuation) <= 96
    sentences = [sentence.strip() for sentence in continuation.split(".") if sentence.strip()]
    facts = [s for s in sentences if re.search(r"code word|works at|drinks|carries", s)]
    assert len(facts) >= 3
    assert all(f"{fact}." in context for fact in facts)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (" amber.", True),
        ("Amber", True),
        ("\nThe code word is AMBER, as said", True),
        ("It is silver. Not amber.", False),
        ("silver\namber", False),
        ("ambers", False),
        ("", False),
    ],
)
def test_the_first_sentence_must_have_the_word(reply, right):
    assert is_right(reply, "amber") is right


def test_a_reply_has_ended_with_its_first_sentence():
    assert first_sentence(" amber") == ("amber", False)
    assert first_sentence("\n\n amber. More") == ("amber", True)
