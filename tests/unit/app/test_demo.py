"""The demo's judge, its questions, and how it draws preferences from what a server answers."""

import asyncio
import json

import httpx
import pytest
from openai import AsyncOpenAI

from app.demo.guard import NUM_ITEMS, candidates, is_right
from app.demo.subjects import Smollm2, Tiny, subject_of
from app.demo.taste import DemoError, User, repetition

LONG = "A volcano is a mountain with fire. It has a crater. Lava comes out of it."


@pytest.mark.parametrize(
    ("answer", "tastes"),
    [
        ("A volcano is a mountain that spits fire.", {"brief"}),
        ("It is 3.5 km high.", {"brief", "direct"}),
        (LONG, {"detailed"}),
        ("They are mountains. It is a fact. Some spit fire.", {"direct", "detailed"}),
        ("Italians know volcanoes well.", {"brief"}),
        ("1. Boil water.\n2. Put the egg in.", {"listed"}),
        ("A volcano is a mountain that", set()),
        ("A volcano is a volcano.", set()),
        ("Do you want to know what it is?", set()),
        ("", set()),
    ],
)
def test_the_form_of_an_answer_decides_its_tastes(answer, tastes):
    assert Smollm2().judge("What is a volcano?", answer).tastes == tastes


@pytest.mark.parametrize("subject", [Tiny(), Smollm2()])
def test_held_out_questions_are_not_taught(subject):
    assert not set(subject.held_out) & set(subject.for_preferences)
    assert len(set(subject.held_out)) == len(subject.held_out) >= 30
    assert len(set(subject.for_preferences)) == len(subject.for_preferences) >= 60
    assert set(subject.course) <= set(subject.tastes)


def test_only_the_built_in_models_can_be_judged():
    assert isinstance(subject_of("tiny-assistant-v1-bc660f53-seed0"), Tiny)
    assert isinstance(subject_of("smollm2-135m-instruct-v1"), Smollm2)
    assert subject_of("Qwen/Qwen2.5-0.5B-Instruct") is None


def test_the_guard_has_hundreds_of_questions():
    asked = candidates()
    assert len({question for question, _ in asked}) == len(asked) > NUM_ITEMS >= 300
    assert all(is_right(question, right, f"It is {right}.") for question, right in asked[:20])


@pytest.mark.parametrize(
    ("question", "right", "answer", "expected"),
    [
        ("What is the capital of France?", "Paris", "The capital of France is Paris.", True),
        ("What is the capital of France?", "Paris", "PARIS! What a city!", True),
        ("What is the capital of France?", "Paris", "It is Parisian.", False),
        ("What is 2 + 3?", "5", "2 + 3 = 5", True),
        ("What is 2 + 3?", "5", "2 + 3 = 15", False),
        ("Which number comes after 5?", "5", "5", False),
    ],
)
def test_an_answer_is_right_if_it_has_the_word(question, right, answer, expected):
    assert is_right(question, right, answer) is expected


def test_repetition_is_the_share_of_runs_of_four_words_that_were_said_before():
    assert repetition("one two three") == 0
    assert repetition("the big cat sat the big cat sat") == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("taste", "answer", "edit"),
    [
        ("brief", LONG, "A volcano is a mountain with fire."),
        ("brief", "A volcano is a mountain that", None),
        ("brief", "A volcano is a volcano. It has a crater.", None),
        ("direct", LONG, LONG.replace("A volcano is", "It is")),
        ("direct", "Volcanoes are hot, and so is lava.", "They are hot, and so is lava."),
        ("direct", "Volcanoes spit fire and lava.", None),
        ("listed", LONG, "- A volcano is a mountain with fire.\n- It has a crater.\n- Lava comes out of it."),
        ("listed", "A volcano is a mountain with fire.", None),
        ("listed", "1. Boil water.\n2. Put the egg in.", "- Boil water.\n- Put the egg in."),
        ("detailed", f"{LONG} It is", LONG),
    ],
)
def test_a_users_edit_cuts_an_answer_or_adds_to_it(taste, answer, edit):
    assert Smollm2().edited("What is a volcano?", answer, taste) == edit


def user(answers, ends="stop"):
    """A user of a server whose models give `answers`: the live one, and the bare one."""

    def reply(request):
        body = json.loads(request.content)
        texts = answers["bare" if body["model"].endswith("@base") else "live"]
        choices = [
            {"index": index, "finish_reason": ends, "message": {"role": "assistant", "content": text}}
            for index, text in enumerate(texts)
        ]
        document = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": choices,
        }
        return httpx.Response(200, json=document)

    http = httpx.AsyncClient(transport=httpx.MockTransport(reply))
    client = AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=http)
    return User(client, "smollm2", Smollm2())


def preferences(taste="brief", count=2, **options):
    return asyncio.run(user(**options).preferences(taste, count))


def test_an_answer_that_suits_is_preferred_to_one_that_does_not():
    items = preferences(answers={"live": [LONG, "It is a mountain with fire.", LONG]})
    assert [(item["chosen_choice_index"], item["rejected_choice_index"]) for item in items] == [(1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("taste", "answers", "value"),
    [
        ("brief", {"live": [LONG]}, "A volcano is a mountain with fire."),
        (
            "listed",
            {"live": ["It is a mountain with fire."], "bare": ["Lava?", LONG]},
            LONG.replace(". ", ".\n- "),
        ),
    ],
)
def test_where_none_suits_one_is_corrected_to_an_edit_of_it_or_of_the_bare_models(taste, answers, value):
    items = preferences(taste, answers=answers)
    assert [(item["type"], item["choice_index"]) for item in items] == [("correction", 0)] * 2
    assert {item["value"].removeprefix("- ") for item in items} == {value}


def test_where_all_suit_one_is_chosen_over_an_edit_to_another_taste():
    items = preferences("detailed", answers={"live": [LONG]})
    assert [(item["chosen"], item["rejected"]) for item in items] == [
        (LONG, "A volcano is a mountain with fire.")
    ] * 2


@pytest.mark.parametrize(
    ("answers", "ends"),
    [
        ({"live": ["A mountain."], "bare": ["A mountain."]}, "stop"),  # says nothing
        ({"live": ["It is a mountain with fire."]}, "length"),  # what was cut off is not chosen
    ],
)
def test_too_few_answers_to_prefer_say_how_many_there_are(answers, ends):
    with pytest.raises(DemoError, match="gave 0 preferences for the taste brief instead of 2"):
        preferences(answers=answers, ends=ends)
