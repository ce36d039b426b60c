"""Our routes and steps around an application that stands for vLLM's."""

import asyncio
import gzip
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from app.http.app import attach_routes
from core.config import AppArgs, SloConfig
from core.errors import ControlUnavailableError, EngineUnavailableError
from deployments.monitors.edge import EdgeMeter


class Control:
    async def stats(self):
        raise ControlUnavailableError("away")

    async def add_feedback(self, items, key):
        return [{"status": "accepted", "id": f"fb-{key}", "pair_id": None} for _ in items]

    async def export_chunk(self, format, after):
        return ([{"row": after}], after + 1) if after < 2 else ([], None)


class Versions:
    live, pinned, canary = "v0002", None, None

    def has_name(self, model):
        return model == "mace-tiny"

    def kept(self, model):
        return nullcontext()

    def cards(self):
        return [{"id": "mace-tiny", "parent": "mace-tiny@v0002"}]


@pytest.fixture
def kept():
    return []


@pytest.fixture
def executor(kept):
    async def nothing():
        return {"executor_id": "e"}

    return SimpleNamespace(
        args=AppArgs(),
        control=Control(),
        versions=Versions(),
        trial=SimpleNamespace(is_running=False),
        edge=EdgeMeter(SloConfig(), None),
        responses=SimpleNamespace(add=kept.append, flush=nothing),
        engine=SimpleNamespace(max_model_len=512),
        base_model="tiny",
        learner=None,
        training_off="training.enabled is false",
        is_ready=True,
        can_serve=True,
        status=nothing,
    )


@pytest.fixture
def client(executor):
    app = FastAPI()

    async def events():
        yield "data: 1\n\n"
        executor.lose_requests(EngineUnavailableError("away"))
        await asyncio.sleep(0)
        yield "data: vLLM's own\n\n"

    @app.get("/v1/models")
    async def models():
        return "vLLM's own"

    @app.post("/v1/completions")
    async def complete(request: Request):
        asked = await request.json()
        if asked["prompt"] == "kill":
            executor.lose_requests(EngineUnavailableError("away"))
            await asyncio.sleep(0)
            return JSONResponse({"error": "vLLM's own"}, 500)
        if asked["prompt"] == "kill a stream":
            return StreamingResponse(events(), media_type="text/event-stream")
        choice = {"index": 0, "text": "a", "finish_reason": "stop"}
        return {"id": "cmpl-1", "model": "mace-tiny@v0002", "choices": [choice], "asked": await request.json()}

    return TestClient(attach_routes(app, executor))


def test_our_models_replace_vllms_and_readiness_names_the_live_version(client):
    [card] = client.get("/v1/models").json()["data"]
    assert (card["id"], card["root"], card["max_model_len"]) == ("mace-tiny", "tiny", 512)
    assert client.get("/v1/models/nobody").json()["error"]["code"] == 404
    assert client.get("/ready").json() == {"ready": True, "live": "v0002"}


def test_a_request_goes_through_every_step(client, kept):
    reply = client.post("/v1/completions", json={"prompt": "p", "service_tier": "batch"}).json()
    assert reply["asked"] == {"prompt": "p", "service_tier": "flex", "priority": 1}
    [response] = kept
    assert (response.response_id, response.prompt, response.text, response.adapter) == (
        "cmpl-1",
        "p",
        "a",
        "v0002",
    )
    assert client.post("/v1/completions", json={"extra_args": {"mace_x": 1}}).status_code == 400
    assert len(kept) == 1


@pytest.mark.parametrize(
    "body", ['{"a": 1, "chosen": 1, "chosen": 2}', '{"items": [{"b": {"chosen": 1, "chosen": 1}}]}']
)
def test_a_key_that_feedback_gives_twice_is_refused_by_its_name(client, body):
    reply = client.post("/v1/feedback", content=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "chosen")
    assert reply.json()["error"]["message"] == "the key 'chosen' is given twice"


@pytest.mark.parametrize(
    ("data", "said"), [(gzip.compress(b"{}", mtime=0), "gzip"), ("{}".encode("utf-16"), "UTF-16")]
)
def test_an_import_of_another_encoding_is_refused_as_a_whole(client, data, said):
    reply = client.post("/v1/feedback/import", content=data)
    assert (reply.status_code, said in reply.json()["error"]["message"]) == (422, True)


def test_a_model_that_does_not_exist_is_answered_with_those_that_do(client):
    reply = client.post("/v1/completions", json={"model": "mace-tiny@v0001", "prompt": "p"})
    assert reply.status_code == 404
    assert reply.json()["error"]["message"].endswith("`mace-tiny@v0001` does not exist. There are mace-tiny.")
    assert reply.json()["error"]["param"] == "model"
    assert client.post("/v1/completions", json={"model": "mace-tiny", "prompt": "p"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models?x=1"),
        ("GET", "/v1/feedback/export?format=trl&fmt=trl"),
        ("POST", "/v1/feedback/import?dryrun=true"),
        ("POST", "/v1/adapters/v0001/activate?pin=true"),
        ("GET", "/ready?x="),
    ],
)
def test_an_unknown_query_parameter_is_refused(client, method, path):
    reply = client.request(method, path)
    assert reply.status_code == 400
    assert "unknown query parameter" in reply.json()["error"]["message"]


def test_feedback_takes_the_json_that_was_parsed_and_says_what_is_wrong_with_another(client):
    reply = client.post("/v1/feedback", json={"items": [{}, {}]}, headers={"Idempotency-Key": "k"})
    assert (reply.status_code, [row["id"] for row in reply.json()["data"]]) == (202, ["fb-k", "fb-k"])
    for body, message in ((b"", "is empty"), (b"{oops", "is no JSON: "), (b"[" * 100_000, "nested too deeply")):
        reply = client.post("/v1/feedback", content=body)
        assert reply.status_code == 400
        assert message in reply.json()["error"]["message"]


def test_an_export_is_one_line_a_row(client):
    assert [json.loads(line) for line in client.get("/v1/feedback/export").text.splitlines()] == [
        {"row": 0},
        {"row": 1},
    ]


def test_training_is_shown_in_part_while_control_is_away_and_cannot_be_paused_without_a_learner(client):
    reply = client.get("/v1/training").json()
    assert (reply["enabled"], reply["executor"]) == (False, {"executor_id": "e"})
    assert reply["error"] == {"message": "away", "type": "ControlUnavailableError"}
    assert client.post("/v1/training/pause").status_code == 409
    assert client.post("/v1/training/rebuild").status_code == 409


def test_the_openapi_document_has_the_errors_and_the_type_of_the_export(client):
    document = client.get("/openapi.json").json()
    operations = {
        f"{method} {path}": {int(status) for status in operation["responses"]}
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert operations["post /v1/completions"] == {200, 400, 403, 404, 413, 415, 500, 503}
    assert operations["get /v1/adapters"] == {200, 400, 415, 500, 503}
    assert operations["post /v1/adapters/{version}/activate"] == {200, 400, 403, 404, 409, 413, 415, 500, 503}
    assert operations["post /v1/feedback"] == {202, 400, 403, 404, 409, 413, 415, 422, 500, 503}
    export = document["paths"]["/v1/feedback/export"]["get"]["responses"]
    assert list(export["200"]["content"]) == ["application/x-ndjson"]
    assert export["503"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
    assert "Error" in document["components"]["schemas"]
    assert client.get("/openapi.json").json() == document


def test_while_the_engine_is_away_what_needs_it_is_refused_at_once_and_the_rest_goes_on(client, executor):
    executor.can_serve = False
    reply = client.post("/v1/completions", json={"prompt": "p"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "EngineUnavailableError")
    assert int(reply.headers["Retry-After"]) > 0
    assert client.get("/ready").status_code == 503
    assert client.get("/ready").json() == {"ready": False, "live": "v0002"}
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").status_code == 200
    assert client.post("/v1/feedback", json={"a": 1}).status_code == 202


def test_requests_under_way_when_the_engine_dies_end_with_our_error_and_not_with_vllms(client, kept):
    reply = client.post("/v1/completions", json={"prompt": "kill"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "EngineUnavailableError")
    reply = client.post("/v1/completions", json={"prompt": "kill a stream"})
    first, last = reply.text.strip().split("\n\n")
    assert first == "data: 1"
    assert "EngineUnavailableError" in last
    assert kept == []
    assert client.post("/v1/completions", json={"prompt": "p"}).status_code == 200
