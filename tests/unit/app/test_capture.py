import json

import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from app.http.capture import MAX_CHOICES, ResponseCapture
from app.http.guard import give_own_id
from app.http.request import RequestChain
from engine.vllm.served_prompts import is_text_part

USER = {"role": "user", "content": "hi"}
MESSAGES = [USER]
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


class Prompts:
    """Stands for vLLM's rendering: text parts are joined by lines, tools stay as they are."""

    def chat(self, body):
        def join(message):
            content = message["content"]
            is_text = isinstance(content, list) and all(map(is_text_part, content))
            return {**message, "content": "\n".join(part["text"] for part in content)} if is_text else message

        return [join(message) for message in body["messages"]], body.get("tools")

    def anthropic(self, body):
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        return self.chat({**body, "messages": system + body["messages"]})


def chat_reply(*texts, reason="stop"):
    choices = [
        {"index": i, "message": {"role": "assistant", "content": t}, "finish_reason": reason}
        for i, t in enumerate(texts)
    ]
    return {"id": "chatcmpl-1", "model": "m@v0002", "choices": choices}


def chat_events(*deltas):
    """Events of (choice, text), or (choice, None) for its end."""
    for index, text in deltas:
        choice = {"index": index, "delta": {"content": text}, "finish_reason": None if text else "stop"}
        yield {"id": "chatcmpl-2", "model": "m@base", "choices": [choice]}
    yield {"id": "chatcmpl-2", "model": "m@base", "choices": [], "usage": {}}


def stream_of(events):
    return StreamingResponse((f"data: {json.dumps(one)}\n\n" for one in events), media_type="text/event-stream")


@pytest.fixture
def kept():
    return []


def client_of(path, respond, kept):
    app = FastAPI()
    app.post(path)(respond)
    steps = [give_own_id, ResponseCapture(kept.append, Prompts())]
    return TestClient(RequestChain(app, steps, 1_000_000, lambda _: None))


def chat(kept, reply=None, **body):
    """What is kept of a chat."""
    client = client_of("/v1/chat/completions", lambda: JSONResponse(reply or chat_reply("a")), kept)
    client.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
    return kept


def test_every_choice_of_a_chat_is_kept_with_its_version(kept):
    chat(kept, chat_reply("a", "b"))
    assert [(r.response_id, r.choice_index, r.text, r.adapter, r.unusable) for r in kept] == [
        ("chatcmpl-1", 0, "a", "v0002", None),
        ("chatcmpl-1", 1, "b", "v0002", None),
    ]
    assert kept[0].prompt == MESSAGES


def test_a_stream_is_put_together_and_the_base_has_no_adapter(kept):
    events = list(chat_events((0, "He"), (1, "x"), (0, "llo"), (1, None), (0, None)))
    client = client_of("/v1/chat/completions", lambda: stream_of(events), kept)
    client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True})
    assert {r.choice_index: (r.text, r.finish_reason) for r in kept} == {0: ("Hello", "stop"), 1: ("x", "stop")}
    assert kept[0].adapter is None


def test_of_a_stream_that_ends_early_only_the_finished_choice_can_be_rated(kept):
    events = list(chat_events((0, "He"), (1, "x"), (0, None)))
    client = client_of("/v1/chat/completions", lambda: stream_of(events), kept)
    client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True})
    by_index = {r.choice_index: r for r in kept}
    assert (by_index[0].text, by_index[0].unusable) == ("He", None)
    assert (
        by_index[1].unusable
        == by_index[-1].unusable
        == "was broken off before its end, so nobody has seen it whole"
    )


def test_a_request_that_is_cancelled_in_its_stream_leaves_the_reason(kept):
    async def events():
        yield f"data: {json.dumps(next(chat_events((0, 'He'))))}\n\n"
        raise RuntimeError("gone")

    reply = StreamingResponse(events(), media_type="text/event-stream")
    client = client_of("/v1/chat/completions", lambda: reply, kept)
    stream = client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True}).text
    assert stream.splitlines()[-3] == "event: error"
    assert {(r.choice_index, "broken off" in r.unusable) for r in kept} == {(0, True), (-1, True)}


@pytest.mark.parametrize("reason", [None, "abort", "error"])
def test_an_answer_without_an_end_of_its_own_cannot_be_rated(kept, reason):
    assert "broken off" in chat(kept, chat_reply("a", reason=reason))[-1].unusable


def test_the_limit_of_tokens_is_marked(kept):
    assert chat(kept, chat_reply("a", reason="length"))[0].finish_reason == "length"


def test_a_request_keeps_a_bounded_number_of_choices_and_says_so_of_the_others(kept):
    chat(kept, chat_reply(*("a" for _ in range(3 * MAX_CHOICES))))
    assert len([r for r in kept if r.unusable is None]) == MAX_CHOICES
    [rest] = [r for r in kept if r.unusable]
    assert (rest.choice_index, "first 64 choices" in rest.unusable) == (-1, True)


def test_the_clients_own_id_is_an_attribute(kept):
    client = client_of("/v1/chat/completions", lambda: JSONResponse(chat_reply("a")), kept)
    client.post("/v1/chat/completions", json={"messages": MESSAGES}, headers={"X-Request-Id": "S#1"})
    client.post("/v1/chat/completions", json={"messages": MESSAGES, "request_id": "mine"})
    client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert [r.client_id for r in kept] == ["S#1", "mine", None]


def test_tools_and_calls_are_kept(kept):
    reply = chat_reply(None, reason="tool_calls")
    reply["choices"][0]["message"]["tool_calls"] = [CALL]
    [response] = chat(kept, reply, tools=[{"type": "function"}])
    assert (response.tools, response.tool_calls, response.text) == ([{"type": "function"}], [CALL], "")


def test_a_call_is_put_together_from_a_stream(kept):
    pieces = [{"index": 0, "id": "c", "type": "function", "function": {"name": "weather"}}]
    pieces += [{"index": 0, "function": {"arguments": text}} for text in ("{", "}")]
    choices = [{"index": 0, "delta": {"tool_calls": [piece]}} for piece in pieces]
    choices += [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]
    events = [{"id": "chatcmpl-3", "choices": [choice]} for choice in choices]
    client = client_of("/v1/chat/completions", lambda: stream_of(events), kept)
    client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert kept[0].tool_calls == [CALL]


def test_token_ids_are_kept_where_the_client_asked_for_them(kept):
    reply = chat_reply("a")
    reply["choices"][0] |= {"token_ids": [1, 2]}
    assert chat(kept, reply)[0].token_ids == (1, 2)
    events = [{"id": "cmpl-1", "choices": [{"index": 0, "text": "a", "token_ids": [n]}]} for n in (3, 4)]
    events[1]["choices"][0]["finish_reason"] = "stop"
    for echo in (False, True):  # with echo they are the prompt's too
        body = {"prompt": "p", "stream": True, "echo": echo}
        client_of("/v1/completions", lambda: stream_of(events), kept).post("/v1/completions", json=body)
    assert [r.token_ids for r in kept[1:]] == [(3, 4), None]


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, IMAGE]}]}, "image_url"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"documents": [{}]}, "documents"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "So"}]}, "continue_final_message"),
    ],
)
def test_a_prompt_that_training_could_not_render_is_named_as_the_reason(kept, body, reason):
    assert reason in chat(kept, **body)[0].unusable


def test_what_the_client_began_is_part_of_the_answer(kept):
    messages = [*MESSAGES, {"role": "assistant", "content": "So "}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    for echo, text in ((False, "it is"), (True, "So it is")):
        chat(kept, chat_reply(text), messages=messages, echo=echo, **more)
    assert [(r.prompt, r.text) for r in kept] == [(MESSAGES, "So it is")] * 2


def test_text_parts_are_kept_as_they_were_rendered(kept):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(kept, messages=[{"role": "user", "content": parts}])[0].prompt[0]["content"] == "a\nb"


def test_reasoning_apart_from_the_text_is_a_reason(kept):
    reply = chat_reply("a")
    reply["choices"][0]["message"]["reasoning"] = "hm"
    assert "reasoning" in chat(kept, reply)[0].unusable


def test_store_false_is_remembered_without_the_text_and_failed_requests_are_not_kept(kept):
    [response] = chat(kept, store=False)
    assert (response.choice_index, response.unusable, response.text) == (-1, "was made with store: false", "")
    failing = client_of("/v1/chat/completions", lambda: JSONResponse(chat_reply("a"), 400), kept)
    failing.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert len(kept) == 1


COMPLETION = {"id": "cmpl-1", "model": "m@base", "object": "text_completion"}


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations"])
def test_a_completion_keeps_its_prompt_as_text_without_the_echo(kept, path):
    choice = {"index": 0, "text": "once upon", "finish_reason": "stop"}
    client = client_of(path, lambda: JSONResponse({**COMPLETION, "choices": [choice]}), kept)
    client.post(path, json={"prompt": "once", "echo": True})
    assert (kept[0].prompt, kept[0].text) == ("once", " upon")


def test_a_completion_of_token_ids_says_why_it_is_not_kept(kept):
    choice = {"index": 0, "text": "x", "finish_reason": "stop"}
    client = client_of("/v1/completions", lambda: JSONResponse({**COMPLETION, "choices": [choice]}), kept)
    client.post("/v1/completions", json={"prompt": [1, 2]})
    assert "token ids" in kept[0].unusable


def test_invocations_of_a_chat_and_a_batch_are_kept(kept):
    reply = {**chat_reply("a", "b"), "object": "chat.completion"}
    client_of("/invocations", lambda: JSONResponse(reply), kept).post("/invocations", json={"messages": MESSAGES})
    assert (kept[0].prompt, kept[0].text) == (MESSAGES, "a")
    path, other = "/v1/chat/completions/batch", [{"role": "user", "content": "other"}]
    client_of(path, lambda: JSONResponse(reply), kept).post(path, json={"messages": [MESSAGES, other]})
    assert [(r.prompt, r.text) for r in kept[2:]] == [(MESSAGES, "a"), (other, "b")]


def messages_events():
    start = {"id": "chatcmpl-4", "model": "m@v0001", "content": []}
    yield {"type": "message_start", "message": start}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "yes"}}
    block = {"type": "tool_use", "id": "c", "name": "weather", "input": {}}
    yield {"type": "content_block_start", "index": 1, "content_block": block}
    yield {"type": "content_block_delta", "index": 1, "delta": {"partial_json": "{}"}}
    yield {"type": "message_delta", "delta": {"stop_reason": "tool_use"}}
    yield {"type": "message_stop"}


def test_messages_are_kept_whole_and_streamed(kept):
    blocks = [
        {"type": "text", "text": "yes"},
        {"type": "tool_use", "id": "c", "name": "weather", "input": {"a": 1}},
    ]
    reply = {"id": "chatcmpl-4", "model": "m@v0001", "content": blocks, "stop_reason": "max_tokens"}
    for respond in (lambda: JSONResponse(reply), lambda: stream_of(messages_events())):
        body = {"messages": MESSAGES, "system": "be kind"}
        client_of("/v1/messages", respond, kept).post("/v1/messages", json=body)
    assert [(r.response_id, r.text, r.adapter, r.finish_reason) for r in kept] == [
        ("chatcmpl-4", "yes", "v0001", "length"),
        ("chatcmpl-4", "yes", "v0001", "tool_calls"),
    ]
    assert kept[0].tool_calls[0]["function"] == {"name": "weather", "arguments": '{"a": 1}'}
    assert kept[1].tool_calls == [CALL]
    assert [m["role"] for m in kept[0].prompt] == ["system", "user"]


OUTPUT = [{"type": "message", "content": [{"type": "output_text", "text": "yes"}]}]


def test_a_responses_call_keeps_instructions_and_input(kept):
    reply = {"id": "resp_1", "model": "m@v0001", "status": "completed", "output": OUTPUT}
    client = client_of("/v1/responses", lambda: JSONResponse(reply), kept)
    client.post("/v1/responses", json={"input": "q", "instructions": "be kind"})
    assert (kept[0].text, kept[0].finish_reason) == ("yes", "stop")
    assert [m["role"] for m in kept[0].prompt] == ["system", "user"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"input": "q", "previous_response_id": "resp_0"}, "previous_response_id"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "other items than messages"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
    ],
)
def test_a_responses_call_with_more_than_messages_says_so(kept, body, reason):
    reply = {"id": "resp_1", "model": "m", "status": "completed", "output": OUTPUT}
    client_of("/v1/responses", lambda: JSONResponse(reply), kept).post("/v1/responses", json=body)
    assert reason in kept[0].unusable


def test_an_unreadable_response_is_still_delivered_and_its_id_known(kept):
    reply = {"id": "chatcmpl-1", "choices": [{"weird": 1}]}
    client = client_of("/v1/chat/completions", lambda: JSONResponse(reply), kept)
    assert client.post("/v1/chat/completions", json={"messages": MESSAGES}).status_code == 200
    assert (kept[0].response_id, kept[0].choice_index) == ("chatcmpl-1", -1)


def test_a_stream_of_a_responses_call_is_kept_as_its_last_event_has_it(kept):
    def event(kind, **response):
        return {"type": kind, "response": {"id": "resp_2", "model": "m@v0001", **response}}

    events = [
        event("response.created", status="in_progress"),
        {"type": "response.output_text.delta", "delta": "ye"},
        event("response.completed", status="completed", output=OUTPUT),
    ]
    for some in (events, events[:2]):
        client = client_of("/v1/responses", lambda some=some: stream_of(some), kept)
        client.post("/v1/responses", json={"input": "q", "stream": True})
    assert (kept[0].response_id, kept[0].text, kept[0].adapter) == ("resp_2", "yes", "v0001")
    assert {r.response_id for r in kept[1:]} == {"resp_2"}
    assert all("broken off" in r.unusable for r in kept[1:])
