"""Rows of public data sets become rows that our own parser takes, or are refused with a reason."""

import contextlib
import json
import time
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.records.row_formats import to_api_row
from alignment.store.formats import export_row
from alignment.store.intake import prepare
from core.alignment_config import FeedbackConfig
from core.errors import InvalidFeedbackError

CONFIG = FeedbackConfig()


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


CHAT = ([user("q")], "good", "bad")
UNDER_SYSTEM = ([system("be brief"), user("q")], "good", "bad")
TURNS = ([user("1"), says("2"), user("q")], "good", "bad")
TALK = {"chosen": [user("q"), says("good")], "rejected": [user("q"), says("bad")]}
TEXTS = {"chosen": "good", "rejected": "bad"}

ROWS = [
    ("trl", {"prompt": "q", **TEXTS}, ("q", "good", "bad")),
    ("trl", {"prompt": "q", **TEXTS, "system": "be brief"}, UNDER_SYSTEM),
    ("trl", {"prompt": "q", **TEXTS, "system": ""}, ("q", "good", "bad")),
    ("trl", {"prompt": [user("q")], "chosen": [says("good")], "rejected": [says("bad")]}, CHAT),
    ("trl", {"prompt": [user("q")], "chosen": says("good"), "rejected": says("bad")}, CHAT),
    ("implicit_prompt", TALK, CHAT),
    (
        "openai",
        {
            "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [says("good")],
            "non_preferred_output": [says("bad")],
        },
        CHAT,
    ),
    ("messages", {"messages": [user("q")], "chosen": says("good"), "rejected": says("bad")}, CHAT),
    ("messages", {"messages": "q", **TEXTS}, CHAT),
    (
        "messages",
        {"messages": [system("be brief"), user("q")], "chosen": [says("good")], "rejected": [says("bad")]},
        UNDER_SYSTEM,
    ),
    ("question", {"system": "be brief", "question": "q", **TEXTS}, UNDER_SYSTEM),
    ("question", {"system": "be brief", "input": "q", **TEXTS, "generations": ["good", "bad"]}, UNDER_SYSTEM),
    ("question", {"instruction": "q", "chosen_response": "good", "rejected_response": "bad"}, CHAT),
    ("question", {"instruction": "1", "input": "2", **TEXTS}, ([user("1\n2")], "good", "bad")),
    ("question", {"instruction": "q", "input": "", **TEXTS}, CHAT),
    ("trl", {"prompt": "q", **TALK, "chosen-rating": 4.5, "rejected-rating": 2.0, "chosen-model": "m"}, CHAT),
    ("trl", {"prompt": "q ", "prompt_id": "7", "messages": TALK["chosen"], **TALK, "score_chosen": 9.0}, CHAT),
    (
        "trl",
        {"prompt": "1", "chosen": [*TURNS[0], says("good")], "rejected": [*TURNS[0], says("bad")]},
        TURNS,
    ),
    ("trl", {"prompt": "q", "system": "be brief", **TALK}, UNDER_SYSTEM),
    (
        "transcript",
        {
            "chosen": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: q\n\nAssistant: bad",
        },
        TURNS,
    ),
    (
        "shp",
        {"post_id": "x", "history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 3},
        CHAT,
    ),
    ("shp", {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0}, CHAT),
]


BEES = "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: q\n\nAssistant:"
ANSWERS = {"chosen": [says("good")], "rejected": [says("bad")]}
ROWS += [
    ("trl", {"prompt": [user("q")], **ANSWERS, "system": "be brief"}, UNDER_SYSTEM),
    ("trl", {"prompt": [system("be brief"), user("q")], **ANSWERS, "system": "be brief "}, UNDER_SYSTEM),
    ("messages", {"messages": [user("q")], **TEXTS, "system": "be brief"}, UNDER_SYSTEM),
    ("implicit_prompt", {**TALK, "system": "be brief"}, UNDER_SYSTEM),
    ("question", {"instruction": "q", "history": [["1", "2"]], **TEXTS}, TURNS),
    ("trl", {"prompt": TURNS[0], "history": [["1", "2"]], **ANSWERS}, TURNS),
    ("trl", {"prompt": "Read this: snow is white. q", "context": "snow is white.", **TEXTS}, None),
    (
        "trl",
        {"prompt": "q", **TEXTS, "question": "q", "documents": [], "turns": [None], "tools": "[]"},
        ("q", *CHAT[1:]),
    ),
    ("transcript", {"chosen": BEES + " good", "rejected": BEES + " bad"}, TURNS),
    ("transcript", {"chosen": BEES.lstrip() + "\ngood\n", "rejected": BEES.lstrip() + " bad"}, TURNS),
    ("transcript", {"chosen": BEES.replace("\n", "\r\n") + " good", "rejected": BEES + " bad"}, TURNS),
    ("transcript", {"prompt": BEES, "chosen": " good", "rejected": " bad", "response": " good"}, TURNS),
    ("transcript", {"prompt": BEES, "chosen": BEES + " good", "rejected": BEES + " bad"}, TURNS),
    ("transcript", {"prompt": "Human: q", **TEXTS, "system": "be brief"}, UNDER_SYSTEM),
    (
        "transcript",
        {
            "chosen": "\n\nHuman: 1\n\nHuman: q\n\nAssistant: good",
            "rejected": "Human: 1\n\nHuman: q\n\nAssistant: bad",
        },
        ([user("1"), user("q")], "good", "bad"),
    ),
    ("shp", {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0.0}, CHAT),
]


@pytest.mark.parametrize(("kind", "row", "expected"), ROWS)
def test_a_public_row_becomes_the_pair_that_it_means(kind, row, expected):
    found = to_api_row(row)
    draft = prepare(found.item, None, CONFIG).draft
    expected = expected or (row["prompt"], row["chosen"], row["rejected"])
    assert (found.format, (draft.prompt, draft.chosen, draft.rejected)) == (kind, expected)


@pytest.mark.parametrize(("kind", "row", "expected"), ROWS)
def test_an_unknown_column_and_a_null_change_nothing(kind, row, expected):
    nulls = dict.fromkeys(("system", "question", "messages", "human_ref_A", "label", "images"))
    nulls |= dict.fromkeys(("context", "tools", "id"), float("nan"))
    expected = expected or (row["prompt"], row["chosen"], row["rejected"])
    found = to_api_row({**nulls, **row, "annotator": 3})
    draft = prepare(found.item, None, CONFIG).draft
    assert "annotator" in found.dropped
    assert (found.format, (draft.prompt, draft.chosen, draft.rejected)) == (kind, expected)


def test_tools_are_taken_in_every_spelling():
    function = {"name": "now", "parameters": {"type": "object", "at": None}}
    tools = [{"type": "function", "function": function}]
    row = {"prompt": [user("q")], **TEXTS}
    for spelling in (tools, [function], json.dumps(tools), json.dumps([function])):
        found = to_api_row({**row, "tools": spelling})
        assert (found.item["tools"], found.dropped) == (tools, ())
        assert prepare(found.item, None, CONFIG).draft.tools == tools
    for nothing in ([], "", "[]", None):
        assert "tools" not in to_api_row({**row, "tools": nothing}).item


SHAREGPT = {"from": "human", "value": "q"}
SPELT = '[{"role": "user", "content": "q"}]'
VOTE = {"user_id": None, "value": {"rank": [1]}, "status": "submitted"}
REFUSED = [
    ({"conversations": [SHAREGPT], "chosen": SHAREGPT, "rejected": SHAREGPT}, "conversations", "ShareGPT"),
    ({"conversations": [SHAREGPT], "label": True}, "conversations", "not a preference"),
    ({"prompt": "q", "chosen": SHAREGPT, "rejected": SHAREGPT}, "chosen", "from and value"),
    (
        {"instruction": "q", "chosen": {"answer": "a", "score": 1}, "rejected": {"answer": "b"}},
        "chosen",
        "'answer'",
    ),
    ({"prompt": "q", "chosen": ["a"], "rejected": ["b"]}, "chosen", "not a list of str"),
    ({"prompt": "q", "chosen": 1, "rejected": 2}, "chosen", "not int"),
    ({"prompt": "q", "reply-ranking": [VOTE]}, None, "Argilla"),
    ({"id": "7", "fields": {"prompt": "q"}, "responses": {}}, None, "Argilla"),
    ({"id": 7, "data": {"prompt": "q"}, "annotations": []}, "annotations", "Label Studio"),
    ({"type": "rating", "data": {"rating": 1}, "meta": {}, "snapshot": {}}, "snapshot", "Open WebUI"),
    ({"messageId": "m", "isCreatedByUser": False, "feedback": {"rating": "thumbsUp"}}, "messageId", "LibreChat"),
    ({"prompt": [user("q")], **ANSWERS, "system": [user("be brief")]}, "system", "must be text"),
    ({"prompt": [system("at length"), user("q")], **ANSWERS, "system": "be brief"}, "system", "something else"),
    ({"prompt": "q", **TEXTS, "context": "a fact"}, "context", "would be lost"),
    ({"prompt": "q", **TEXTS, "Chat-History": [["1", "2"]]}, "Chat-History", "would be lost"),
    ({"prompt": "q", **TEXTS, "messages": [user("1"), says("2"), user("q")]}, "messages", "would be lost"),
    ({**TALK, "question": "another"}, "question", "would be lost"),
    ({"question": "q", "input": "1", **TEXTS}, "input", "would be lost"),
    ({"prompt": "q", **TEXTS, "chosen_response": "other"}, "chosen_response", "would be lost"),
    (
        {"input": {"messages": [user("q")]}, "preferred_output": [], "system": "be brief"},
        "system",
        "would be lost",
    ),
    ({"prompt": SPELT, "chosen": "a", "rejected": "b"}, "prompt", "spells messages"),
    (
        {"prompt": "q", "chosen": "{'content': 'a', 'role': 'assistant'}", "rejected": "b"},
        "chosen",
        "spells messages",
    ),
    ({"prompt": "prompter: q?assistant:", **TEXTS}, "prompt", "marks of speakers"),
    ({"question": "Be kind.\n\nUser: q\nAI:", **TEXTS}, "question", "marks of speakers"),
    ({"prompt": "### Instruction:\nq\n\n### Response:\n", **TEXTS}, "prompt", "marks of speakers"),
    ({"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", **TEXTS}, "prompt", "chat template"),
    ({"prompt": "[INST] q [/INST]", **TEXTS}, "prompt", "chat template"),
    ({"prompt": "q", "completion": "a", "label": True}, "completion", "KTO"),
    ({"prompt": "q", "completion": "a"}, "completion", "single answer"),
    ({"prompt": "q", "completions": ["a"], "labels": [True]}, "completions", "KTO"),
    ({"prompt": "q", "chosen": "a"}, "rejected", "rejected is required"),
    (TEXTS, "prompt", "no prompt"),
    ({"question": ["q"], **TEXTS}, "question", "must be text"),
    ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "labels", "1 (A is preferred)"),
    ({"human_ref_A": "a", "human_ref_B": "b", "labels": 1}, "history", "required"),
    ({"prompt": "q", **TEXTS, "images": ["data:"]}, "images", "only text"),
    ({"prompt": "q", **TEXTS, "tools": "[{"}, "tools", "no JSON"),
    ({"prompt": "q", **TEXTS, "tools": ["now"]}, "tools", "list of objects"),
    ({"preference.responses": [["a", "b"]], "prompt": "q"}, None, "Argilla"),
    ({"text": "x"}, None, "'text'"),
    ({}, None, "none"),
]


@pytest.mark.parametrize(("row", "param", "reason"), REFUSED)
def test_a_row_that_is_no_preference_is_refused_with_the_reason(row, param, reason):
    with pytest.raises(InvalidFeedbackError) as error:
        to_api_row(row)
    assert (error.value.param, reason in str(error.value)) == (param, True)


def test_rows_of_our_own_keep_every_key_and_stay_strict():
    own = {"prompt": "q", **TEXTS, "id": "a", "user": "u", "weight": 2.0, "tags": {"k": "v"}}
    assert to_api_row(own).item == own
    typo = {"type": "preference", "prompt": "q", **TEXTS, "wieght": 2.0}
    assert to_api_row(typo).item == typo
    assert prepare(to_api_row(typo).item, None, CONFIG).error.param == "wieght"
    rating = {"response_id": "r", "value": True, "extra": 1}
    assert to_api_row(rating).item == rating


def test_a_text_that_is_meant_as_it_stands_is_taken_so():
    for prompt in (SPELT, BEES, "prompter: q?assistant:", "[INST] q [/INST]"):
        row = {"type": "preference", "prompt": prompt, **TEXTS}
        assert to_api_row(row, chat=True).item == row
        assert export_row(prompt, "good", "bad", "trl") == row
    assert export_row("Q: 2+2?\nA:", "4", "5", "trl") == {"prompt": "Q: 2+2?\nA:", "chosen": "4", "rejected": "5"}


def test_a_weight_counts_whatever_else_a_row_holds():
    assert to_api_row({"prompt": "q", **TEXTS, "score": 1, "weight": 2.0}).item["weight"] == 2.0
    moment = datetime(2025, 1, 1)  # noqa: DTZ001 - as Arrow gives it
    found = to_api_row({"prompt": "q", **TEXTS, "id": 7, "user": "u", "created_at": moment})
    assert (found.item["user"], found.item["created_at"], found.dropped) == ("u", 1735689600.0, ("id",))


def test_ids_of_a_data_set_are_not_ours():
    assert to_api_row({"prompt": "q", **TEXTS, "id": 7}).item == {"prompt": "q", **TEXTS}
    assert to_api_row({"prompt": "q", **TEXTS, "id": "7", "score": 1}).item == {"prompt": "q", **TEXTS}


def test_a_plain_prompt_is_a_user_message_on_request():
    assert to_api_row({"prompt": "q", **TEXTS}, chat=True).item["prompt"] == [user("q")]


def test_transcripts_that_part_before_the_last_answer_are_refused():
    row = {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}
    assert "same conversation" in str(prepare(to_api_row(row).item, None, CONFIG).error)


@pytest.mark.parametrize(
    ("row", "param"),
    [
        ({"chosen": BEES + " good", "rejected": BEES}, "rejected"),
        ({"chosen": BEES + " a\n\nHuman: Thanks", "rejected": BEES + " b\n\nHuman: Thanks"}, "chosen"),
        ({"chosen": BEES + " a\n\nAssistant: is a mark", "rejected": BEES + " b"}, "rejected"),
        ({"prompt": BEES + " Well,", "chosen": " yes", "rejected": " no"}, "prompt"),
        ({"prompt": [{"role": "USER", "content": "q"}], **ANSWERS}, "prompt.0.role"),
        ({"prompt": [user("q")], "chosen": [says("a")], "rejected": [user("b")]}, "rejected"),
    ],
)
def test_what_only_our_api_can_judge_is_refused_by_its_name(row, param):
    assert prepare(to_api_row(row).item, None, CONFIG).error.param == param


NAMES = """prompt chosen rejected messages question instruction input system labels id type value history human_ref_A
human_ref_B chosen_response rejected_response \ud800"""
COLUMNS = st.sampled_from(NAMES.split())
VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "messages"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(COLUMNS, VALUES, max_size=6))
def test_any_row_is_converted_or_refused_with_a_printable_reason(row):
    try:
        found = to_api_row(row)
    except InvalidFeedbackError as error:
        str(error).encode()
        return
    again = to_api_row(found.item)
    assert again.item == found.item
    assert not again.dropped


@pytest.mark.parametrize(
    "filler", ["\n", " ", "\n\n ", "[{ '", "bot ", "#*", "Human: ", "\r\n", "\n\nHuman:", "[ "]
)
@pytest.mark.parametrize("end", ["", "x", "\nAssistant:"])
def test_no_text_takes_long_to_judge(filler, end):
    text, started_s = filler * 40_000 + end, time.process_time()
    for row in (
        {"prompt": text, **TEXTS},
        {"prompt": "q", "chosen": text, "rejected": text + "x"},
        {"chosen": "Human: " + text, "rejected": "Human: x" + text},
        {"prompt": "q", **TEXTS, "context": text},
    ):
        with contextlib.suppress(InvalidFeedbackError):
            to_api_row(row)
    assert time.process_time() - started_s < 4
