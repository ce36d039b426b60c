import json

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from app.http.guard import guard, set_request_class
from app.http.request import REQUEST_KEY, RequestChain

FIELD_PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"]


@pytest.fixture
def refused():
    return []


@pytest.fixture
def client(refused):
    app = FastAPI()

    @app.post("/{path:path}")
    async def echo(request: Request):
        return {
            "body": (await request.body()).decode(),
            "length": request.headers.get("content-length"),
            "header": request.headers.get("x-vllm-priority"),
            "parsed": request.scope[REQUEST_KEY].json,
        }

    return TestClient(RequestChain(app, [guard, set_request_class], 10_000, refused.append))


def received(client, path, request):
    """What the route behind the guard gets."""
    reply = client.post(path, content=json.dumps(request))
    assert reply.status_code == 200
    assert int(reply.json()["length"]) == len(reply.json()["body"].encode())
    return json.loads(reply.json()["body"])


@pytest.mark.parametrize("path", FIELD_PATHS)
@pytest.mark.parametrize("tier", ["flex", "batch"])
def test_flex_and_batch_become_priority_1_and_everything_else_stays(client, path, tier):
    request = {
        "model": "m",
        "prompt": 'Zoë said "hi" \U0001f600',
        "seed": 2**60,
        "stop": None,
        "service_tier": tier,
    }
    expected = {**request, "service_tier": "flex", "priority": 1}
    assert received(client, path, request) == expected


@pytest.mark.parametrize("tier", ["auto", "default", "scale", "priority", None])
def test_interactive_tiers_leave_the_body_byte_for_byte(client, tier):
    body = json.dumps({"service_tier": tier, "x": [1.0, 1e5]}, indent=3)
    for path in [*FIELD_PATHS, "/v1/messages"]:
        assert client.post(path, content=body).json()["body"] == body


def test_a_body_without_a_tier_is_not_touched(client):
    for body in ('{ "prompt" : "\\u00e9" }', "[1,  2]", "{oops", '"flex"'):
        assert client.post("/v1/completions", content=body).json()["body"] == body


def test_fast_is_passed_on_as_priority_without_another_class(client):
    assert received(client, "/v1/responses", {"service_tier": "fast"}) == {"service_tier": "priority"}


@pytest.mark.parametrize("priority", [-5, 0, 3, None, "7"])
def test_a_priority_field_decides_over_the_tier(client, priority):
    for tier in ("flex", "batch", "default"):
        request = {"service_tier": tier, "priority": priority}
        assert received(client, "/v1/chat/completions", request)["priority"] == priority


def test_messages_have_no_priority_field_so_the_header_carries_it(client):
    def header(request, **options):
        return client.post("/v1/messages", json=request, **options).json()["header"]

    assert header({"service_tier": "batch"}) == "1"
    assert header({"service_tier": "flex"}, headers={"X-Vllm-Priority": "4"}) == "4"
    assert header({"service_tier": "standard_only"}) is None
    assert received(client, "/v1/messages", {"service_tier": "batch"}) == {"service_tier": "batch"}


@pytest.mark.parametrize("path", [*FIELD_PATHS, "/v1/messages"])
@pytest.mark.parametrize("tier", ["Flex", "cheap", "", 1, True, ["flex"], {"flex": 1}])
def test_a_tier_that_does_not_exist_is_400_in_openais_shape(client, refused, path, tier):
    reply = client.post(path, json={"service_tier": tier})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["code"], error["type"]) == ("service_tier", 400, "BadRequestError")
    assert "auto, batch, default" in error["message"]
    assert refused == ["service_tier"]


def test_standard_only_belongs_to_messages_alone(client):
    assert client.post("/v1/chat/completions", json={"service_tier": "standard_only"}).status_code == 400


def test_other_routes_may_use_the_word_as_they_like(client):
    request = {"service_tier": "anything"}
    assert received(client, "/v1/feedback", request) == request
    assert received(client, "/v1/messages/count_tokens", request) == request


def test_the_parsed_body_is_the_clients(client):
    """What is kept for feedback is what was asked."""
    reply = client.post("/v1/completions", json={"prompt": "p", "service_tier": "batch"}).json()
    assert reply["parsed"] == {"prompt": "p", "service_tier": "batch"}


def test_an_internal_key_is_refused_before_the_tier_is_looked_at(client, refused):
    reply = client.post("/v1/completions", json={"service_tier": "nope", "vllm_xargs": {"mace_x": 1}})
    assert reply.json()["error"]["param"] == "vllm_xargs"
    assert refused == ["internal_key"]
