"""Every input form, its normal form, and its errors."""

import json
from typing import Any

import pytest

from alignment.records.feedback import (
    Comment,
    Correction,
    OpenAIPreferenceRow,
    PreferenceByIds,
    PreferenceRow,
    Rating,
    parse_item,
)
from alignment.records.pairs import (
    PairDraft,
    StoredResponse,
    pair_from_correction,
    pair_from_ids,
    pair_from_row,
    prompt_key,
    split_of,
)
from alignment.store.intake import prepare
from core.alignment_config import FeedbackConfig
from core.errors import InvalidFeedbackError, UnknownResponseError

CONFIG = FeedbackConfig(max_text_chars=100)
USER = {"role": "user", "content": "Hi?"}
SYSTEM = {"role": "system", "content": "Be kind."}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def pair_of(raw: dict[str, Any]) -> PairDraft:
    item = parse_item(raw)
    assert isinstance(item, PreferenceRow | OpenAIPreferenceRow)
    return pair_from_row(item, CONFIG.max_text_chars)


def refusal(raw: object) -> InvalidFeedbackError:
    error = prepare(raw, None, CONFIG).error
    assert isinstance(error, InvalidFeedbackError), raw
    return error


TEXTS = {"chosen": "good", "rejected": "bad"}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "at": None}}}]
CHAT_PAIR = PairDraft([USER], "good", "bad")


@pytest.mark.parametrize(
    "raw",
    [
        {"type": "preference", "prompt": [USER], "chosen": [says("good")], "rejected": [says("bad")]},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"prompt": "Hi?", "chosen": [says("good")], "rejected": [says("bad")]},
        {"chosen": [USER, says("good")], "rejected": [USER, says("bad")]},
        {"prompt": "Hi?", "chosen": [USER, says("good")], "rejected": [USER, says("bad")]},
        {"prompt": [USER], "chosen": [USER, says("good")], "rejected": [USER, says("bad")]},
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [says("good")],
            "non_preferred_output": [says("bad")],
        },
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}],
            "chosen": "good",
            "rejected": "bad",
        },
    ],
)
def test_every_chat_form_becomes_the_same_pair(raw):
    assert pair_of(raw) == CHAT_PAIR


def test_several_parts_stay_parts_for_the_template_and_count_as_lines():
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]
    message = {"role": "user", "content": parts}
    assert pair_of({"prompt": [message], **TEXTS}).prompt == [message]
    assert prompt_key([message]) == prompt_key([{"role": "user", "content": "Hi\n?"}])
    answer = {"role": "assistant", "content": parts}
    assert pair_of({"prompt": [USER], "chosen": [answer], "rejected": "bad"}).chosen == "Hi\n?"


def test_plain_text_rows_keep_a_plain_text_prompt():
    assert pair_of({"prompt": "2+2=", "chosen": "4", "rejected": "5"}) == PairDraft("2+2=", "4", "5")


def test_the_implicit_prompt_may_hold_more_than_the_explicit_one():
    row = {"prompt": "Hi?", "chosen": [SYSTEM, USER, says("good")], "rejected": [SYSTEM, USER, says("bad")]}
    assert pair_of(row).prompt == [SYSTEM, USER]


def test_tool_calls_may_stand_in_the_prompt_and_be_the_answer():
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "12:00"}
    prompt = pair_of({"prompt": [USER, turn, result], "chosen": "good", "rejected": "bad"}).prompt
    assert prompt == [USER, {**turn, "content": ""}, result]
    pair = pair_of({"prompt": [USER], "chosen": [turn], "rejected": "bad", "tools": TOOLS})
    assert pair == PairDraft([USER], "", "bad", tools=TOOLS, chosen_calls=[call])
    as_objects = {"tool_calls": [{"function": {"name": "now", "arguments": {"of": "é"}}}]}
    [made] = pair_of(
        {"prompt": [USER], "chosen": "good", "rejected": [{"role": "assistant", **as_objects}]}
    ).rejected_calls
    assert made == {"type": "function", "function": {"name": "now", "arguments": '{"of": "é"}'}}
    bad = {**call, "function": {"name": "now", "arguments": "{"}}
    refused = {"prompt": [USER], "chosen": "good", "rejected": [{**turn, "tool_calls": [bad]}]}
    assert "no JSON object" in str(refusal(refused))
    same = {**call, "id": "c2"}
    alike = {"prompt": [USER], "chosen": [turn], "rejected": [{**turn, "tool_calls": [same]}]}
    assert "same text" in str(refusal(alike))
    assert "prompt of messages" in str(refusal({"prompt": "q", "chosen": "a", "rejected": "b", "tools": TOOLS}))


def test_tools_of_both_forms_are_those_of_the_pair_in_their_order():
    answers = {"preferred_output": [says("good")], "non_preferred_output": [says("bad")]}
    assert pair_of({"input": {"messages": [USER], "tools": TOOLS}, **answers}).tools == TOOLS
    assert json.dumps(pair_of({"prompt": [USER], **TEXTS, "tools": TOOLS}).tools) == json.dumps(TOOLS)


@pytest.mark.parametrize(
    ("raw", "param", "words"),
    [
        (None, None, "null"),
        ([], None, "a list"),
        ({}, "type", "cannot tell"),
        ({"type": "thumbs"}, "type", "must be one of"),
        ({"type": []}, "type", "must be one of"),
        ({"type": "preference"}, "chosen", "required"),
        ({"prompt": "p", "chosen": "a"}, "rejected", "required"),
        ({"chosen": "a", "rejected": "b"}, "prompt", "required"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt", "empty"),
        ({"prompt": [{"role": "user", "content": ""}], "chosen": "a", "rejected": "b"}, "prompt", "empty"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt", "at least 1"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "chosen", "empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "a \n"}, "rejected", "same text"),
        ({"prompt": "p", "chosen": "a" * 101, "rejected": "b"}, "chosen", "101 characters"),
        ({"prompt": "p" * 101, "chosen": "a", "rejected": "b"}, "prompt", "limit is 100"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "chosen", "string"),
        ({"prompt": "p", "chosen": "a\ud800", "rejected": "b"}, "chosen", "lone surrogate"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "user": "\x00"}, "user", "NUL"),
        ({"type": "comment", "value": "v", "created_at": 1735689600123}, "created_at", "not milliseconds"),
        ({"type": "comment", "value": "v", "created_at": 1735689600123456789}, "created_at", "not milliseconds"),
        ({"type": "comment", "value": "v", "created_at": -1}, "created_at", "from 1970"),
        ({"type": "comment", "value": "v", "created_at": "2101-01-01"}, "created_at", "from 1970"),
        ({"prompt": "p", "chosen": "a", "rejected": "\ud800"}, "rejected", "surrogate"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "\udfff": 1}, None, "key"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": float("nan")}, "weight", "finite"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": 0}, "weight", "greater than 0"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": "2"}, "weight", "number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": True}, "weight", "number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": 10**400}, "weight", "64 bits"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tags": {"k": 1}}, "tags.k", "string"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "created_at": "soon"}, "created_at", "ISO 8601"),
        *(
            ({"type": "comment", "value": "x", "created_at": moment}, "created_at", "Unix seconds")
            for moment in (
                1735689600123,
                1735689600123456789,
                -1,
                "2100-01-01",
                "1969-12-31T23:59:59Z",
                "1735689600",
            )
        ),
        ({"response_id": "r", "score": 1}, "score", "value (true or false"),
        ({"response_id": "r", "rating": "thumbsUp"}, "rating", "value (true or false"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "id": ""}, "id", "at least 1"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "choosen": "a"}, "choosen", "did you mean 'chosen'"),
        ({"prompt": [{**USER, "x": 1}], "chosen": "a", "rejected": "b"}, "prompt.0.x", "unknown key 'x'"),
        ({"prompt": [{"role": "robot"}], "chosen": "a", "rejected": "b"}, "prompt.0.role", "system"),
        ({"prompt": [USER, says("x")], "chosen": "a", "rejected": "b"}, "prompt", "must not end"),
        ({"prompt": [USER], "chosen": [USER], "rejected": "b"}, "chosen", "end with an assistant"),
        ({"chosen": [USER, says("a")], "rejected": [SYSTEM, says("b")]}, "rejected", "same conversation"),
        (
            {"prompt": "Other?", "chosen": [USER, says("a")], "rejected": [USER, says("b")]},
            "chosen",
            "followed by",
        ),
        ({"chosen_id": "a"}, "rejected_id", "required"),
        ({"chosen_id": "a", "rejected_id": "b", "prompt": "p"}, "prompt", "unknown key"),
        ({"chosen_id": "a#1", "chosen_choice_index": 2, "rejected_id": "b"}, "chosen_choice_index", "contradicts"),
        ({"chosen_id": "a", "rejected_id": "b", "chosen_index": -1}, "chosen_index", "greater than or equal"),
        ({"input": {"messages": [USER]}, "preferred_output": [says("a")]}, "non_preferred_output", "required"),
        (
            {
                "input": {"messages": [USER], "tools": [{}]},
                "preferred_output": [says("a")],
                "non_preferred_output": [],
            },
            "input.tools.0.function",
            "required",
        ),
        ({"response_id": "r", "value": "better"}, "type", "cannot tell"),
        ({"type": "rating", "response_id": "r", "value": 0}, "value", "up"),
        ({"type": "rating", "response_id": "r", "value": {}}, "value", "up"),
        ({"type": "rating", "value": True}, "response_id", "required"),
        ({"type": "rating", "response_id": "r", "value": 1, "chosen": "a"}, "chosen", "unknown key"),
        ({"type": "correction", "response_id": "r"}, "value", "required"),
        ({"type": "comment", "value": "  "}, "value", "empty"),
        ({"type": "comment", "value": "x" * 101}, "value", "limit"),
        (
            {"prompt": json.loads("[" * 60 + "]" * 60), "chosen": "a", "rejected": "b"},
            "prompt." + "0." * 60,
            "deeper",
        ),
    ],
)
def test_a_bad_item_is_refused_with_the_key_and_the_reason(raw, param, words):
    error = refusal(raw)
    assert words in str(error)
    assert error.param == param or (param or "").startswith(error.param or "\0")


@pytest.mark.parametrize(
    ("value", "expected"), [(True, 1), (1, 1), (1.0, 1), ("up", 1), (False, -1), (-1, -1), ("down", -1)]
)
def test_a_rating_needs_no_type_and_knows_every_spelling(value, expected):
    item = parse_item({"response_id": "r#2", "value": value})
    assert isinstance(item, Rating)
    assert item.value == expected
    assert item.refs == [("r", 2)]


def test_types_may_be_left_out_where_keys_are_clear():
    assert isinstance(parse_item({"response_id": "r", "value": [says("x")]}), Correction)
    assert isinstance(parse_item({"chosen_id": "a", "rejected_id": "b"}), PreferenceByIds)
    comment = parse_item({"type": "comment", "value": "nice", "user": "u", "tags": {"page": "1"}, "source": "web"})
    assert isinstance(comment, Comment)
    assert comment.refs == []


def test_created_at_may_be_seconds_or_iso_text():
    base = {"type": "comment", "value": "x"}
    assert parse_item({**base, "created_at": 60}).created_at == 60.0
    assert parse_item({**base, "created_at": "1970-01-01T00:01:00Z"}).created_at == 60.0
    assert parse_item({**base, "created_at": "1970-01-01T00:01:00"}).created_at == 60.0
    assert parse_item({**base, "created_at": "1970-01-01T00:01:00.123456789Z"}).created_at == 60.123456
    assert parse_item({**base, "created_at": 0}).created_at == 0


def stored(response_id: str, text: str, prompt: Any = "Hi?", choice_index: int = 0) -> StoredResponse:
    return StoredResponse(response_id, choice_index, prompt, text, "v0001")


RESPONSES = {
    (one.response_id, one.choice_index): one
    for one in (
        stored("a", "good", [USER]),
        stored("b", "bad", [USER]),
        stored("b", "third", [USER], 1),
        stored("c", "other", [SYSTEM, USER]),
        stored("e", " ", [USER]),
    )
}


def by_ids(**raw: Any) -> PairDraft:
    item = parse_item(raw)
    assert isinstance(item, PreferenceByIds)
    return pair_from_ids(item, RESPONSES.get, CONFIG)


def test_ids_bring_prompt_texts_and_adapter_versions():
    expected = PairDraft([USER], "good", "bad", "v0001", "v0001")
    assert by_ids(chosen_id="a", rejected_id="b") == expected


def test_the_choice_index_may_be_a_key_an_alias_or_a_suffix():
    for raw in ({"chosen_choice_index": 1}, {"chosen_index": 1}):
        assert by_ids(chosen_id="b", rejected_id="b", **raw).chosen == "third"
    assert by_ids(chosen_id="b#1", rejected_id="b").chosen == "third"
    assert by_ids(chosen_id="b#1", chosen_choice_index=1, rejected_id="b").chosen == "third"


@pytest.mark.parametrize(
    ("raw", "kind", "words"),
    [
        ({"chosen_id": "a", "rejected_id": "zz"}, UnknownResponseError, "has the id 'zz'"),
        ({"chosen_id": "a#7", "rejected_id": "b"}, UnknownResponseError, "'a#7'"),
        ({"chosen_id": "a", "rejected_id": "a"}, InvalidFeedbackError, "choice indices"),
        ({"chosen_id": "a", "rejected_id": "c"}, InvalidFeedbackError, "different prompts"),
        ({"chosen_id": "a", "rejected_id": "e"}, InvalidFeedbackError, "rejected_id is empty"),
    ],
)
def test_ids_that_cannot_be_compared_are_refused(raw, kind, words):
    with pytest.raises(kind, match=words):
        by_ids(**raw)


def test_a_correction_prefers_the_edit_to_the_original():
    original = stored("a", "bad", [USER])
    assert pair_from_correction("better", original, 100) == PairDraft([USER], "better", "bad", None, "v0001")
    item = parse_item({"type": "correction", "response_id": "a", "value": [USER, says("better")]})
    assert isinstance(item, Correction)
    assert pair_from_correction(item.value, original, 100).chosen == "better"
    with pytest.raises(InvalidFeedbackError, match="original prompt"):
        pair_from_correction(item.value, stored("a", "bad", [SYSTEM]), 100)
    with pytest.raises(InvalidFeedbackError, match="same text"):
        pair_from_correction("bad", original, 100)


def test_prompt_keys_and_splits_do_not_change_between_releases():
    assert prompt_key("Hi?")[:16] == "81c135b7c6feef23"
    assert prompt_key([USER])[:16] == "231d8bc228219f92"
    assert split_of("0" * 64, 0.15) == "heldout"
    assert split_of("f" * 64, 0.15) == "train"
    assert prompt_key("a  b\n") == prompt_key("a b")
    assert prompt_key([USER]) != prompt_key("Hi?")
    assert prompt_key([USER]) != prompt_key([SYSTEM, USER])


def test_the_split_takes_about_its_share_and_grows_monotonically():
    keys = [prompt_key(f"prompt {number}") for number in range(2000)]
    small = {key for key in keys if split_of(key, 0.15) == "heldout"}
    large = {key for key in keys if split_of(key, 0.3) == "heldout"}
    assert 0.12 < len(small) / len(keys) < 0.18
    assert small < large
    assert not any(split_of(key, 0.0) == "heldout" for key in keys)
