import json

import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel, model_validator
from starlette.testclient import TestClient

from app.http.errors import BadRequestError, install_error_handlers
from app.http.guard import (
    check_internal_keys,
    check_origin,
    check_size,
    give_own_id,
    guard,
    note_client,
    num_choices,
)
from app.http.request import REQUEST_KEY, RequestChain
from core.config import EngineConfig
from engine.vllm.requests import CLIENT


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


@pytest.mark.parametrize(
    ("body", "choices"),
    [
        ({}, 1),
        ({"prompt": "x", "n": 3}, 3),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": [1, 2, 3]}, 1),
        ({"messages": [{"role": "user", "content": "x"}] * 5, "best_of": 2}, 2),
        ({"messages": [[{"role": "user", "content": "x"}]] * 5}, 5),
        ({"n": "3", "prompt": None}, 1),
    ],
)
def test_the_answers_that_a_request_asks_for(body, choices):
    assert num_choices(body) == choices


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"n": 4}, 200),
        ({"n": 5}, 400),
        ({"prompt": ["x"] * 5}, 400),
        ({"n": 2, "max_tokens": 50}, 200),
        ({"n": 2, "max_completion_tokens": 51}, 400),
        ({"n": True, "max_tokens": None}, 200),
    ],
)
def test_one_request_may_not_ask_for_everything(body, status):
    answer = FastAPI()
    answer.post("/v1/completions")(lambda: "ok")
    limits = EngineConfig(max_choices=4, max_request_tokens=100)
    chain = RequestChain(answer, [check_size(limits)], 1000, lambda _: None)
    assert TestClient(chain).post("/v1/completions", json=body).status_code == status


@pytest.mark.parametrize(
    ("body", "client"), [({"user": "u"}, "u"), ({}, "testclient:50000"), ([], "testclient:50000")]
)
def test_the_engine_is_told_who_asks(body, client):
    app, seen = FastAPI(), []
    app.post("/x")(lambda: seen.append(CLIENT.get()))
    TestClient(RequestChain(app, [note_client], 1000, lambda _: None)).post("/x", json=body)
    assert seen == [client]


def test_an_answers_id_is_ours_whatever_the_client_sent():
    app = FastAPI()

    @app.post("/x")
    async def echo(request: Request):
        return [request.headers["x-request-id"], (await request.json()).get("request_id")]

    app.post("/v1/responses")(app.router.routes[-1].endpoint)
    chain = TestClient(RequestChain(app, [give_own_id], 1000, lambda _: None))
    [header, field] = chain.post("/v1/responses", json={"request_id": "same"}).json()
    assert field == f"resp_{header}"
    replies = [
        chain.post("/x", json={"request_id": "same"}, headers={"X-Request-Id": "same#1"}).json() for _ in range(2)
    ]
    assert len({name for reply in replies for name in reply}) == 2
    assert all(header == body and len(header) == 32 for header, body in replies)


def test_a_body_that_a_validator_stumbles_over_is_the_clients_mistake_and_a_routes_fault_is_ours():
    class Body(BaseModel):
        @model_validator(mode="before")
        @classmethod
        def check(cls, data):
            return data["a"].get("b")

    app = FastAPI()

    @app.post("/body")
    async def take(body: Body):
        return "ok"

    @app.post("/fault")
    async def fail():
        raise AttributeError("ours")

    install_error_handlers(app)
    chain = TestClient(RequestChain(app, [], 1000, lambda _: None), raise_server_exceptions=False)
    refused = chain.post("/body", json={"a": 1e30})
    assert (refused.status_code, "AttributeError" in refused.json()["error"]["message"]) == (400, True)
    assert chain.post("/fault", json={}).status_code == 500


def test_a_body_that_nests_too_deeply_for_any_reader_is_refused(client):
    chain = TestClient(RequestChain(FastAPI(), [guard], 1 << 20, lambda _: None))
    reply = chain.post("/invocations", content="[" * 200_000)
    assert (reply.status_code, "too deeply" in reply.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("origin", "allowed", "status"),
    [
        (None, (), 200),
        ("http://testserver", (), 200),
        ("http://evil.example", (), 403),
        ("null", (), 403),
        ("http://testserver.evil.example", (), 403),
        ("http://testserver:8080", (), 403),
        ("http://ui.example", ["http://ui.example"], 200),
        ("http://evil.example", ["http://ui.example"], 403),
        ("http://evil.example", ["*"], 200),
    ],
)
def test_a_page_of_another_origin_sends_nothing(refused, origin, allowed, status):
    app = FastAPI()
    app.add_api_route("/do", lambda: "done", methods=["GET", "POST", "DELETE"])
    client = TestClient(RequestChain(app, [check_origin(allowed)], 1000, refused.append))
    headers = {"Content-Type": "text/plain", **({"Origin": origin} if origin else {})}
    for method in ("POST", "DELETE"):
        reply = client.request(method, "/do", headers=headers, content=b"{}" if method == "POST" else None)
        assert reply.status_code == status
    assert refused == (["origin"] * 2 if status == 403 else [])
    assert client.get("/do", headers=headers).status_code == 200


def test_a_page_that_asks_leave_of_cors_gets_an_error_of_openais_shape(refused):
    client = TestClient(RequestChain(FastAPI(), [check_origin(())], 1000, refused.append))
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    reply = client.options("/do", headers=headers)
    assert (reply.status_code, "may not send this" in reply.json()["error"]["message"]) == (400, True)


def test_a_stream_in_which_the_server_fails_ends_with_an_error_event():
    async def fails(scope, receive, send):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise ValueError("boom")

    reply = TestClient(RequestChain(fails, [], 1000, lambda _: None)).post("/x", json={})
    begun, event, data = reply.text.strip().replace("\n\n", "\n").split("\n")
    assert (begun, event) == ("data: {}", "event: error")
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == 500
    assert "boom" not in data
