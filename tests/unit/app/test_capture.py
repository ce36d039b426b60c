import json

import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from app.http.capture import ResponseCapture
from app.http.request import RequestChain

MESSAGES = [{"role": "user", "content": "hi"}]


def chat_reply(*texts):
    choices = [{"index": i, "message": {"role": "assistant", "content": t}} for i, t in enumerate(texts)]
    return {"id": "chatcmpl-1", "model": "m@v0002", "choices": choices}


def chat_events(*deltas):
    for index, text in deltas:
        yield {"id": "chatcmpl-2", "model": "m@base", "choices": [{"index": index, "delta": {"content": text}}]}
    yield {"id": "chatcmpl-2", "model": "m@base", "choices": [], "usage": {}}


@pytest.fixture
def kept():
    return []


def client_of(path, respond, kept):
    app = FastAPI()
    app.post(path)(respond)
    return TestClient(RequestChain(app, [ResponseCapture(kept.append)], 10_000, lambda _: None))


def test_every_choice_of_a_chat_is_kept_with_its_version(kept):
    client = client_of("/v1/chat/completions", lambda: JSONResponse(chat_reply("a", "b")), kept)
    client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert [(r.response_id, r.choice_index, r.text, r.adapter) for r in kept] == [
        ("chatcmpl-1", 0, "a", "v0002"),
        ("chatcmpl-1", 1, "b", "v0002"),
    ]
    assert kept[0].prompt == MESSAGES


def test_a_stream_is_put_together_and_the_base_has_no_adapter(kept):
    def stream():
        for event in chat_events((0, "He"), (1, "x"), (0, "llo")):
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"

    client = client_of("/v1/chat/completions", lambda: StreamingResponse(stream()), kept)
    reply = client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True})
    assert reply.text.endswith("data: [DONE]\n\n")
    assert {r.choice_index: r.text for r in kept} == {0: "Hello", 1: "x"}
    assert kept[0].adapter is None


def test_store_false_and_failed_requests_are_not_kept(kept):
    client = client_of("/v1/chat/completions", lambda: JSONResponse(chat_reply("a")), kept)
    client.post("/v1/chat/completions", json={"messages": MESSAGES, "store": False})
    failing = client_of("/v1/chat/completions", lambda: JSONResponse(chat_reply("a"), 400), kept)
    failing.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert kept == []


def test_a_completion_keeps_its_prompt_as_text_without_the_echo(kept):
    reply = {"id": "cmpl-1", "model": "m@base", "choices": [{"index": 0, "text": "once upon"}]}
    client = client_of("/v1/completions", lambda: JSONResponse(reply), kept)
    client.post("/v1/completions", json={"prompt": "once", "echo": True})
    assert (kept[0].prompt, kept[0].text) == ("once", " upon")


def test_a_completion_of_token_ids_is_not_kept(kept):
    reply = {"id": "cmpl-1", "model": "m", "choices": [{"index": 0, "text": "x"}]}
    client_of("/v1/completions", lambda: JSONResponse(reply), kept).post(
        "/v1/completions", json={"prompt": [1, 2]}
    )
    assert kept == []


def test_a_responses_call_keeps_instructions_and_input(kept):
    output = [{"type": "message", "content": [{"type": "output_text", "text": "yes"}]}]
    reply = {"id": "resp_1", "model": "m@v0001", "status": "completed", "output": output}
    client = client_of("/v1/responses", lambda: JSONResponse(reply), kept)
    client.post("/v1/responses", json={"input": "q", "instructions": "be kind"})
    assert kept[0].text == "yes"
    assert [m["role"] for m in kept[0].prompt] == ["system", "user"]


def test_an_unreadable_response_is_still_delivered(kept):
    client = client_of("/v1/chat/completions", lambda: JSONResponse({"choices": [{"weird": 1}]}), kept)
    assert client.post("/v1/chat/completions", json={"messages": MESSAGES}).status_code == 200
    assert kept == []


def test_a_stream_of_a_responses_call_is_kept_as_its_last_event_has_it(kept):
    def event(kind, **response):
        return f"event: {kind}\ndata: {json.dumps({'type': kind, 'response': response})}\n\n"

    def stream():
        yield event("response.created", id="resp_2", model="m@v0001", status="in_progress")
        yield 'data: {"type": "response.output_text.delta", "delta": "ye"}\n\n'
        output = [{"type": "message", "content": [{"type": "output_text", "text": "yes"}]}]
        yield event("response.completed", id="resp_2", model="m@v0001", status="completed", output=output)

    client = client_of("/v1/responses", lambda: StreamingResponse(stream()), kept)
    client.post("/v1/responses", json={"input": "q", "stream": True})
    [response] = kept
    assert (response.response_id, response.text, response.adapter) == ("resp_2", "yes", "v0001")
