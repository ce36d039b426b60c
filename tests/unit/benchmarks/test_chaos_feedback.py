import asyncio
import itertools
import json

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from openai import AsyncOpenAI

from benchmarks.harness.client import HttpPort, Load
from benchmarks.studies.chaos.load import (
    POST,
    FeedbackPort,
    Ledger,
    export_all_pairs,
    preferences,
    questions,
    read_all_feedback,
)


def entries_of(bodies):
    return [{"id": body["id"], "item": body} for body in bodies]


def rows_of(bodies):
    return [
        {
            "prompt": body["prompt"],
            "chosen": [{"role": "assistant", "content": body["chosen"]}],
            "rejected": [{"role": "assistant", "content": body["rejected"]}],
        }
        for body in bodies
    ]


@pytest.fixture
def sent():
    return list(itertools.islice(preferences(seed=0), 6))


@pytest.fixture
def ledger(sent):
    """Five acknowledged, the last in doubt."""
    return Ledger({body["id"]: body for body in sent}, {body["id"] for body in sent[:5]})


def test_a_store_with_everything_once_has_lost_nothing(ledger, sent):
    audit = ledger.audit(entries_of(sent), rows_of(sent))
    assert (audit.lost, audit.duplicated, audit.unknown) == ([], [], 0)
    assert (audit.acknowledged, audit.in_doubt, audit.in_doubt_stored) == (5, 1, 1)
    assert ledger.audit(entries_of(sent[:5]), rows_of(sent[:5])).in_doubt_stored == 0


def test_a_missing_altered_or_pairless_record_is_lost(ledger, sent):
    without = [body for body in sent if body is not sent[0]]
    assert ledger.audit(entries_of(without), rows_of(without)).lost == [sent[0]["id"]]
    altered = [{**sent[1], "chosen": "else"}, *(body for body in sent if body is not sent[1])]
    assert ledger.audit(entries_of(altered), rows_of(sent)).lost == [sent[1]["id"]]
    pairless = [body for body in sent if body is not sent[2]]
    assert ledger.audit(entries_of(sent), rows_of(pairless)).lost == [sent[2]["id"]]


def test_a_second_record_of_an_id_a_content_or_a_pair_is_a_duplicate(ledger, sent):
    assert ledger.audit(entries_of([*sent, sent[3]]), rows_of(sent)).duplicated == [sent[3]["id"]]
    copy = {**sent[3], "id": "another"}
    audit = ledger.audit(entries_of([*sent, copy]), rows_of(sent))
    assert (audit.duplicated, audit.unknown) == (sorted([sent[3]["id"], "another"]), 1)
    in_doubt = sent[5]
    assert ledger.audit(entries_of(sent), rows_of([*sent, in_doubt])).duplicated == [in_doubt["id"]]


def test_preferences_never_repeat_an_id_or_a_prompt_and_change_their_taste():
    bodies = list(itertools.islice(preferences(seed=2), 400))
    assert len({body["id"] for body in bodies}) == 400
    assert len({body["prompt"][0]["content"] for body in bodies}) == 400
    assert bodies[0]["chosen"].startswith("It is")
    assert bodies[399]["chosen"].startswith("Let me explain")
    assert all(body["chosen"] != body["rejected"] for body in bodies)


def chunk(finish=None):
    choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": finish}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n"


DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("lines", "status", "succeeded"),
    [
        ([chunk(), chunk("stop"), DONE], 200, True),
        ([chunk()], 200, False),
        ([chunk(), 'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n', DONE], 200, False),
        ([], 500, False),
    ],
)
def test_a_chat_request_succeeds_only_if_the_whole_answer_came(lines, status, succeeded):
    app = FastAPI()
    asked = []

    @app.post("/v1/chat/completions")
    async def answer():
        asked.append(1)
        return StreamingResponse(iter(lines), status, media_type="text/event-stream")

    async def run():
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        async with AsyncOpenAI(base_url="http://x/v1", api_key="none", max_retries=0, http_client=http) as client:
            load = Load(HttpPort(client, "mace-tiny"))
            load.send(next(questions(1.0, seed=0)))
            await load.drain(5)
            return load.records

    [request] = asyncio.run(run())
    assert request.succeeded is succeeded
    assert len(asked) == 1


def feedback_app(fail_first):
    """Stores what it is sent; of the first posts it stores some without saying so. Returns the app and its store."""
    app, stored, posts = FastAPI(), {}, itertools.count()

    @app.post("/v1/feedback")
    async def post(request: Request):
        body = await request.json()
        items = body.get("items", [body])
        if "refuse" in items[0]["id"]:
            return JSONResponse({"error": {}}, 422)
        rows = [{"id": one["id"], "status": "duplicate" if one["id"] in stored else "accepted"} for one in items]
        stored.update({one["id"]: one for one in items})
        if next(posts) < fail_first:
            return JSONResponse({"error": {}}, 503)
        return JSONResponse({"data": rows} if "items" in body else rows[0], 202)

    @app.get("/v1/feedback")
    async def page(limit: int, after: str | None = None):
        ids = list(stored)
        begin = 0 if after is None else ids.index(after) + 1
        return {"data": entries_of(stored[i] for i in ids[begin : begin + 2]), "has_more": begin + 2 < len(ids)}

    @app.get("/v1/feedback/export")
    async def export():
        lines = [json.dumps(row) + "\n" for row in rows_of(stored.values())]
        return StreamingResponse(iter(lines), media_type="application/x-ndjson")

    return app, stored


def test_feedback_is_repeated_under_its_id_until_it_is_acknowledged(monkeypatch):
    monkeypatch.setattr("benchmarks.studies.chaos.load._REPEAT_PAUSE_S", 0.0)
    app, stored = feedback_app(fail_first=3)

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            ledger = Ledger()
            load = Load(FeedbackPort(client, preferences(0), ledger))
            for _ in range(8):  # the eighth is a list of three
                assert (await load.ask(POST)).succeeded
            return ledger, ledger.audit(await read_all_feedback(client), await export_all_pairs(client))

    ledger, audit = asyncio.run(run())
    assert ledger.repeats == 3
    assert ledger.answers == {"503": 3, "202": 8}
    assert ledger.acknowledged == set(stored)
    assert (audit.acknowledged, audit.lost, audit.duplicated) == (10, [], [])


def test_a_refused_record_is_not_repeated():
    app, _ = feedback_app(fail_first=0)

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            ledger = Ledger()
            await Load(FeedbackPort(client, iter([{"id": "refuse-1"}]), ledger)).ask(POST)
            return ledger

    ledger = asyncio.run(run())
    assert (list(ledger.refused), ledger.repeats, ledger.acknowledged) == (["refuse-1"], 0, set())
