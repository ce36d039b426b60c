"""What can be said about an answer of ours, and why not; on both databases."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.records.pairs import ALL_CHOICES, NOT_STORED, StoredResponse, prompt_key
from alignment.records.response_ids import may_be_running, new_request_id
from alignment.store.formats import export_chunk, export_row, import_jsonl
from alignment.store.schema import AnyText
from core.alignment_config import FeedbackConfig

USER = [{"role": "user", "content": "Hi?"}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
EVERY_CHARACTER = "a\x00b\x1a0\x1a1\x1a\x7f\u2028\u0085\ufffe\ufffd\U0001f469\u200d\x1f\r\n\t\\u0000 end"


def call(city, ident="c"):
    arguments = json.dumps({"city": city})
    return [{"id": ident, "type": "function", "function": {"name": "weather", "arguments": arguments}}]


def put(store, name, text="text", index=0, **more):
    store.responses.put([StoredResponse(name, index, USER, text, "v0001", **more)])


def say(store, **item):
    [outcome] = store.feedback.add([item])
    return outcome


def rate(store, name, value, **more):
    return say(store, type="rating", response_id=name, value=value, **more)


def pair_of(store, outcome):
    [pair] = store.pairs.find([outcome.pair_id])
    return pair


def test_every_character_survives_store_rating_export_and_import(store, open_store):
    put(store, "a", EVERY_CHARACTER)
    put(store, "b", "\x00")
    rate(store, "a", 1)
    pair = pair_of(store, rate(store, "b", -1))
    assert (pair.chosen, pair.rejected) == (EVERY_CHARACTER, "\x00")
    outcome = say(store, type="correction", response_id="b", value=EVERY_CHARACTER)
    assert pair_of(store, outcome).chosen == EVERY_CHARACTER
    line = json.dumps(export_row(USER, pair.chosen, pair.rejected, "trl"), ensure_ascii=False)
    other = open_store(name="other")
    assert import_jsonl([line.encode()], other.feedback.add).num_accepted == 1
    [again] = other.pairs.after(0, 9)
    assert (again.chosen, again.rejected, again.prompt) == (pair.chosen, pair.rejected, pair.prompt)
    assert say(store, type="comment", value="a\x00").status == "accepted"


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0\x1a01")))
def test_any_text_is_written_without_a_nul_and_read_as_it_was(text):
    column = AnyText()
    written = column.process_bind_param(text, None)
    assert "\0" not in written
    assert column.process_result_value(written, None) == text


@pytest.mark.parametrize(
    ("reason", "kind"),
    [(NOT_STORED, "UnknownResponseError"), ("was broken off before its end", "InvalidFeedbackError")],
)
def test_the_reason_why_an_answer_cannot_be_rated_is_told(store, reason, kind):
    store.responses.put([StoredResponse("a", ALL_CHOICES, unusable=reason)])
    put(store, "a", index=1)
    for outcome in (
        rate(store, "a", 1),
        rate(store, "a#7", 1),
        say(store, type="correction", response_id="a", value="x"),
        say(store, type="comment", response_id="a", value="x"),
        say(store, chosen_id="a", rejected_id="a#1"),
    ):
        assert (outcome.error_type, reason in outcome.message) == (kind, True), outcome
    assert rate(store, "a#1", 1).status == "accepted"
    assert store.responses.count() == 1


def test_an_evicted_answer_is_told_apart_from_one_that_never_was(open_store):
    store = open_store(FeedbackConfig(max_responses=20))
    for number in range(60):
        put(store, f"r{number}")
    assert "newer answers came" in rate(store, "r35", 1).message
    assert rate(store, "r35", 1).error_type == "UnknownResponseError"
    assert rate(store, "r59", 1).status == "accepted"
    assert "has the id 'nobody'" in rate(store, "nobody", 1).message


def test_reasons_are_bounded_and_push_no_answer_out(open_store):
    store = open_store(FeedbackConfig(max_responses=20))
    put(store, "mine")
    for number in range(60):
        store.responses.put([StoredResponse(f"r{number}", ALL_CHOICES, unusable=NOT_STORED)])
    assert rate(store, "mine", 1).status == "accepted"
    assert "store: false" in rate(store, "r59", 1).message
    assert "that is remembered" in rate(store, "r0", 1).message


def test_an_answer_whose_request_may_still_run_is_to_be_repeated(store, clock):
    clock.now_s = time.time()
    ident = f"chatcmpl-{new_request_id()}"
    assert len(ident) <= 64
    outcome = rate(store, ident, 1, id="mine")
    assert (outcome.error_type, "again" in outcome.message) == ("ResponseNotReadyError", True)
    put(store, ident)
    assert rate(store, ident, 1, id="mine").status == "accepted"
    assert rate(store, f"{ident}#1", 1).error_type == "UnknownResponseError"  # the request has ended
    later = clock.now_s + 3700
    assert not may_be_running(ident, later)
    assert not may_be_running("chatcmpl-c11", clock.now_s)


def test_an_answer_that_was_cut_off_is_not_the_better_one(open_store):
    store = open_store()
    put(store, "cut", "It is P", finish_reason="length")
    put(store, "whole", "It is Paris.", finish_reason="stop")
    refused = say(store, chosen_id="cut", rejected_id="whole")
    assert (refused.error_type, refused.param) == ("InvalidFeedbackError", "chosen_id")
    assert say(store, chosen_id="whole", rejected_id="cut").pair_id
    assert say(store, type="correction", response_id="cut", value="It is Paris.").pair_id
    assert rate(store, "cut", 1).pair_id is None
    assert rate(store, "whole", -1).pair_id is None
    put(store, "bad", "No.", finish_reason="stop")
    assert rate(store, "cut", -1, user="ann").pair_id is None
    assert rate(store, "whole", 1, user="ann").pair_id
    free = open_store(FeedbackConfig(cut_off_as_chosen=True, holdout_fraction=0))
    assert say(free, chosen_id="cut", rejected_id="whole").pair_id


def test_answers_to_tools_are_pairs_with_the_tools(store):
    put(store, "call", "", tools=TOOLS, tool_calls=call("Ulm"), finish_reason="tool_calls")
    put(store, "text", "Sunny.", tools=TOOLS, finish_reason="stop")
    put(store, "same", "", tools=TOOLS, tool_calls=call("Ulm", "other"), finish_reason="tool_calls")
    put(store, "plain", "Sunny.", finish_reason="stop")
    pair = pair_of(store, say(store, chosen_id="call", rejected_id="text"))
    assert (pair.tools, pair.chosen_calls, pair.rejected_calls) == (TOOLS, call("Ulm"), None)
    assert (pair.chosen, pair.rejected) == ("", "Sunny.")
    assert "same text" in say(store, chosen_id="call", rejected_id="same").message
    assert "different prompts" in say(store, chosen_id="text", rejected_id="plain").message
    assert "calls a tool" in say(store, type="correction", response_id="call", value="It rains.").message
    assert pair_of(store, say(store, type="correction", response_id="text", value="It rains.")).tools == TOOLS
    rate(store, "call", -1)
    rated = pair_of(store, rate(store, "text", 1))
    assert (rated.chosen, rated.rejected_calls, rated.tools) == ("Sunny.", call("Ulm"), TOOLS)
    assert prompt_key(USER) != prompt_key(USER, TOOLS)


def test_token_ids_go_with_the_answers_that_have_them(store):
    put(store, "a", "good", token_ids=(1, 2))
    put(store, "b", "bad", token_ids=(3,))
    by_ids = pair_of(store, say(store, chosen_id="a", rejected_id="b"))
    corrected = pair_of(store, say(store, type="correction", response_id="b", value="better"))
    rate(store, "b", -1)
    rated = pair_of(store, rate(store, "a", 1))
    assert [(one.chosen_ids, one.rejected_ids) for one in (by_ids, corrected, rated)] == [
        ((1, 2), (3,)),
        (None, (3,)),
        ((1, 2), (3,)),
    ]


def test_a_rehearsed_import_reports_the_same_and_stores_nothing(store):
    lines = [json.dumps({"prompt": f"p{n % 700}", "chosen": "a", "rejected": "b"}) for n in range(1200)]
    lines[5] = "{"
    rehearsed = store.feedback.rehearse(lambda add: import_jsonl(lines, add))
    assert (store.counts().feedback, store.pairs.after(0, 9)) == ({}, [])
    assert import_jsonl(lines, store.feedback.add) == rehearsed
    assert (rehearsed.num_accepted, rehearsed.num_duplicates, rehearsed.num_errors) == (700, 499, 1)


def test_a_prompt_is_stored_as_it_would_be_imported(store):
    said = {"role": "assistant", "content": "good", "refusal": None, "tool_calls": [], "extra": 1}
    prompt = [{"role": "user", "content": "a\nb"}, said, {"role": "user", "content": "c", "name": "ann"}]
    store.responses.put([StoredResponse("a", 0, prompt, "text")])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    value = [
        {"role": "user", "content": parts},
        said | {"extra": None},
        prompt[2],
        {"role": "assistant", "content": "x"},
    ]
    pair = pair_of(store, say(store, type="correction", response_id="a", value=value))
    assert pair.prompt == [prompt[0], {"role": "assistant", "content": "good"}, prompt[2]]
    value[0] = {"role": "user", "content": "other"}
    assert "not the original prompt" in say(store, type="correction", response_id="a", value=value).message


def test_messages_as_servers_return_them_are_taken(store):
    empty = {
        "refusal": None,
        "tool_calls": [],
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": "",
    }
    message = {"role": "assistant", "content": "good", **empty}
    [outcome] = store.feedback.add(
        [{"prompt": [*USER, message, *USER], "chosen": [message], "rejected": [{**message, "content": "bad"}]}]
    )
    pair = pair_of(store, outcome)
    assert pair.prompt == [*USER, {"role": "assistant", "content": "good"}, *USER]
    [refused] = store.feedback.add([{"prompt": USER, "chosen": [{**message, "refusal": "no"}], "rejected": "bad"}])
    assert "unknown key 'refusal'" in refused.message


def test_a_pair_with_tools_comes_back_from_an_export_as_it_was(store):
    zone = {"type": "object", "required": ["zone"], "at": None}
    tools = [{"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": zone}}]
    item = {
        "prompt": USER,
        "tools": tools,
        "rejected": "Sunny.",
        "chosen": [{"role": "assistant", "tool_calls": call("Ulm")}],
    }
    pair = pair_of(store, say(store, **item))
    assert json.dumps(pair.tools) == json.dumps(tools)  # in the order in which a template prints it
    assert pair.chosen_calls == call("Ulm")
    for form in ("trl", "openai"):
        [row], _ = export_chunk(store.pairs, form, 0, 1)
        again = pair_of(store, say(store, **row))
        kept = (
            "prompt",
            "chosen",
            "rejected",
            "tools",
            "chosen_calls",
            "rejected_calls",
            "prompt_key",
            "pair_key",
        )
        assert [getattr(again, name, None) for name in kept] == [getattr(pair, name, None) for name in kept]
