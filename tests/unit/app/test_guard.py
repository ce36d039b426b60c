import json

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from app.http.errors import BadRequestError
from app.http.guard import check_internal_keys, guard
from app.http.request import REQUEST_KEY, RequestChain


@pytest.fixture
def refused():
    return []


@pytest.fixture
def client(refused):
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request):
        return {"body": (await request.body()).decode(), "parsed": request.scope[REQUEST_KEY].json}

    @app.get("/echo")
    async def get():
        return "ok"

    return TestClient(RequestChain(app, [guard], 1000, refused.append))


def test_a_body_is_replayed_and_parsed_once(client):
    reply = client.post("/echo", content=b'{"a": [1]}').json()
    assert reply == {"body": '{"a": [1]}', "parsed": {"a": [1]}}


def test_what_is_no_json_passes_unparsed(client):
    assert client.post("/echo", content=b"{oops").json() == {"body": "{oops", "parsed": None}
    assert client.get("/echo").json() == "ok"


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": {"mace_finetune_task": "{}"}},
        {"extra_args": {"mace_finetune_task": {}}},
        {"sampling_params": {"extra_args": {" MACE_x": 1}}},
        {"requests": [{"vllm_xargs": {"mace_x": 1}}]},
    ],
)
def test_internal_keys_are_refused_at_any_depth(client, refused, body):
    reply = client.post("/echo", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "BadRequestError"
    assert refused == ["internal_key"]


def test_an_escaped_internal_key_is_refused(client):
    assert client.post("/echo", content=b'{"vllm_xargs": {"\\u006dace_finetune_task": 1}}').status_code == 400


def test_other_extra_arguments_pass(client):
    assert client.post("/echo", json={"vllm_xargs": {"kv_pruning": False}}).status_code == 200


@pytest.mark.parametrize("value", ["false", 0, None, [False]])
def test_kv_pruning_is_true_or_false(client, value):
    reply = client.post("/echo", json={"vllm_xargs": {"kv_pruning": value}})
    assert reply.status_code == 400
    assert "kv_pruning is true or false" in reply.json()["error"]["message"]
    assert client.post("/echo", json={"messages": [{"content": "mace_finetune_task"}]}).status_code == 200


def test_a_body_that_is_too_large_is_413_whether_or_not_it_says_so(client, refused):
    assert client.post("/echo", content=b"x" * 1001).status_code == 413

    def chunks():
        for _ in range(20):
            yield b"x" * 100

    reply = client.post("/echo", content=chunks())
    assert reply.status_code == 413
    assert "1000 bytes" in reply.json()["error"]["message"]
    assert refused == ["body_too_large"] * 2


def test_deep_nesting_is_no_crash(client):
    assert client.post("/echo", content=b"[" * 900).status_code == 200
    check_internal_keys(json.loads("[" * 300 + "]" * 300))


def test_the_error_names_the_argument():
    with pytest.raises(BadRequestError, match="extra_args may not carry 'mace_a'"):
        check_internal_keys({"extra_args": {"mace_a": 1}})


@pytest.mark.parametrize(
    "body",
    [{"requests": 5}, {"requests": [5]}, {"vllm_xargs": 5}, {"extra_args": [1]}, [], 5, "x", None, {"model": {}}],
)
def test_any_json_value_may_stand_anywhere(client, body):
    assert client.post("/echo", json=body).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-Request-Id": "a" * 257}, 400),
        ({"X-Request-Id": "a\tb"}, 400),
        ({"X-Request-Id": b"\xc3\xa4"}, 400),
        ({"X-Request-Id": "a-1"}, 200),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Encoding": "identity"}, 200),
    ],
)
def test_headers_that_cannot_be_taken_are_refused(client, headers, status):
    assert client.post("/echo", json={}, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("text", "status"), [(r'{"a": "\ud800"}', 400), (r'{"\uDFff": 1}', 400), (r'{"a": "\ud83d\ude00"}', 200)]
)
def test_half_a_character_is_refused(client, text, status):
    assert client.post("/echo", content=text).status_code == status


@pytest.mark.parametrize(
    "body", [{"prompt_logprobs": None}, {"echo": True}, {"logprobs": 5}, {"echo": False, "logprobs": 1}]
)
def test_other_log_probabilities_pass(client, body):
    assert client.post("/echo", json=body).status_code == 200
