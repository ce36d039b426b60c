"""`GET /v1/drift` and `mace drift`, on the state of a real tracker."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import typer
from fastapi import FastAPI
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from alignment.drift.streams import ScoredPair
from alignment.drift.tracker import DriftTracker
from app.commands import drift as command
from app.http.routes import training as route
from core.alignment_config import DriftConfig


@pytest.fixture
def client():
    tracker, events = DriftTracker(DriftConfig()), []
    for seq in range(120):
        loss, margin = (0.05, 3.0) if seq < 100 else (3.05, -3.0)
        events += tracker.observe(ScoredPair(f"p{seq}", seq, loss, margin, "hi", "[bold]ann", {}, 1.0, 1e9 + seq))

    async def drift(limit, stream):
        history = [asdict(event) for event in reversed(events) if stream in (None, event.stream)]
        return {**tracker.to_wire(), "history": history[:limit]}

    app = FastAPI()
    app.include_router(route.router)
    app.state.executor = SimpleNamespace(control=SimpleNamespace(drift=drift))
    return TestClient(app)


@pytest.fixture
def mace(client, monkeypatch):
    monkeypatch.setattr(
        command, "call", lambda url, method, path, **kwargs: client.request(method, path, **kwargs)
    )
    app = typer.Typer()
    app.command()(command.drift)

    def run(*words):
        result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_the_route_shows_state_and_history(client):
    state = client.get("/v1/drift").json()
    assert (state["drifted"], state["level"], state["last_change_seq"]) == (True, 1.0, 99)
    assert {event["kind"] for event in state["history"]} >= {"window", "accuracy"}
    only = client.get("/v1/drift", params={"stream": "user:[bold]ann", "limit": 1}).json()["history"]
    assert [event["stream"] for event in only] == ["user:[bold]ann"]


@pytest.mark.parametrize("limit", ["-1", "1001", "x"])
def test_a_limit_out_of_bounds_is_refused(client, limit):
    assert client.get("/v1/drift", params={"limit": limit}).status_code == 422


def test_the_command_says_what_happened_and_takes_names_as_they_are(mace):
    text = mace()
    assert "drifted: preference accuracy" in text
    assert "user:[bold]ann" in text
    assert "HDDM_A: mean accuracy 1.00 -> 0.00" in text


def test_the_command_prints_json_with_as_much_history_as_asked_for(mace):
    assert json.loads(mace("--json", "--history", "0"))["history"] == []
    assert len(json.loads(mace("--json", "--stream", "global", "--history", "1"))["history"]) == 1
