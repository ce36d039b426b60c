"""`mace training` and the routes behind it, with a learner and a Control that only remember."""

import json
from types import SimpleNamespace

import pytest
import typer
from fastapi import FastAPI
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app.commands import training as command
from app.http.errors import install_error_handlers
from app.http.routes import training as route
from core.errors import ConflictError
from core.wire import Rebuild

RUNNING = {"state": "running", "passes": 0, "num_taken": 2, "num_pairs": 5, "loss": 0.6931}
PUBLISHED = {**RUNNING, "state": "published", "version": "v0002", "reason": "accuracy 1.000 (live 0.900)"}
REFUSED = {**RUNNING, "state": "refused", "version": "v0002", "reason": "accuracy fell from 1.000 to 0.500"}


class World:
    def __init__(self):
        self.users = None
        self.refusal = None
        self.reports = [RUNNING, None, PUBLISHED]
        self.queue = {}

    def check_rebuild(self):
        if self.refusal:
            raise ConflictError(self.refusal)

    async def begin_rebuild(self, executor_id, users):
        self.users = users
        return Rebuild(tuple(users), 5, 5)

    async def stats(self):
        report = self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]
        return {"rebuild": report, "queue": self.queue}

    async def status(self):
        return {"executor_id": "e", "paused": False}


@pytest.fixture
def world():
    return World()


@pytest.fixture
def learner(world):
    begun = []
    return SimpleNamespace(
        begun=begun, begin_rebuild=begun.append, check_rebuild=world.check_rebuild, silence=lambda: ""
    )


@pytest.fixture
def client(world, learner):
    app = FastAPI()
    app.include_router(route.router)
    app.state.executor = SimpleNamespace(
        control=world,
        learner=learner,
        training_off="cannot train gpt2",
        executor_id="e",
        status=world.status,
    )
    install_error_handlers(app)
    return TestClient(app)


@pytest.fixture
def mace(client, monkeypatch):
    def call(url, method, path, **kwargs):
        reply = client.request(method, path, **kwargs)
        if reply.is_error:
            command.fail(reply.json()["error"]["message"])
        return reply

    monkeypatch.setattr(command, "call", call)
    monkeypatch.setattr(command, "_POLL_S", 0.0)
    app = typer.Typer()
    app.command()(command.training)
    return lambda *words: CliRunner().invoke(app, list(words))


def test_a_rebuild_is_asked_for_and_followed_to_its_end(mace, world, learner):
    result = mace("rebuild", "--without-user", "eve", "--without-user", "bob")
    assert result.exit_code == 0, result.output
    assert world.users == ["eve", "bob"]
    assert learner.begun == [Rebuild(("eve", "bob"), 5, 5)]
    first, second, last = result.output.splitlines()
    assert "5 pairs anew from the base" in first
    assert second == "pass 1: 2 of 5 pairs, loss 0.693"
    assert last == "v0002 went live, or on trial: accuracy 1.000 (live 0.900)"


def test_a_refused_rebuild_ends_the_command_with_the_reason(mace, world):
    world.reports = [RUNNING, REFUSED]
    result = mace("rebuild")
    assert (result.exit_code, world.users) == (1, [])
    assert "the rebuild was refused: accuracy fell" in result.output


def test_what_cannot_begin_says_why_and_nothing_is_left_out(mace, world):
    world.refusal = "v0001 is pinned"
    result = mace("rebuild", "--without-user", "eve")
    assert (result.exit_code, world.users) == (1, None)
    assert "v0001 is pinned" in result.output


def test_a_server_that_forgot_ends_the_command(mace, world, monkeypatch):
    monkeypatch.setattr(command, "_PATIENCE_S", -1.0)
    world.reports = [None]
    result = mace("rebuild")
    assert result.exit_code == 1
    assert "`mace adapters`" in result.output


def test_without_a_server_the_command_says_how_to_start_one():
    app = typer.Typer()
    app.command()(command.training)
    result = CliRunner().invoke(app, ["rebuild", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "no server at http://127.0.0.1:9" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("words", [["rebuilt"], ["show", "--without-user", "eve"]])
def test_words_that_mean_nothing_are_refused(mace, words):
    assert mace(*words).exit_code == 2


def test_the_status_is_json(mace):
    assert json.loads(mace("show").output)["rebuild"] == RUNNING


@pytest.mark.parametrize("body", [{"without_user": "eve"}, {"without_users": "eve"}, {"without_users": [5]}, []])
def test_an_odd_body_is_refused(client, world, body):
    assert client.post("/v1/training/rebuild", json=body).status_code == 422
    assert world.users is None


@pytest.mark.parametrize("width", [80, 120])
def test_the_reason_of_an_unfit_version_can_be_read_on_any_terminal(width):
    from rich.console import Console

    from app.commands.adapters import _table

    reason = "v0001: trained for another base model: the chat template of 'model' differed"
    rows = [{"version": "v0001", "status": "unfit", "reason": reason}]
    rows.append(
        {"version": "v0002", "status": "published", "parent": "v0001", "num_pairs": 42, "activated_at": 1.7e9}
    )
    rows[1] |= {"metrics": {"candidate_accuracy": 0.8, "live_accuracy": 0.5}, "reason": "accuracy", "live": True}
    console = Console(width=width, record=True)
    console.print(_table(rows, width))
    lines = [line.split("│") for line in console.export_text().splitlines() if line.startswith("│")]
    assert [line[3].strip() for line in lines if line[1].strip()] == ["unfit", "published"]
    told = " ".join(line[-2].strip() for line in lines)
    assert told == f"{reason} accuracy"


def stand_still(for_s):
    return {"standstill": {"for_s": for_s, "reasons": ["e: a batch takes 3.00 GiB, and it may have 0.95 GiB"]}}


def test_a_long_standstill_is_a_warning_with_its_reasons(mace, world, learner):
    world.queue = stand_still(for_s=20.0)
    assert "warning" not in mace("show").output
    world.queue = stand_still(for_s=312.0)
    told = mace("show").output
    assert "warning: nothing has been trained or scored for 312 s: e: a batch takes 3.00 GiB" in told


def test_an_executor_that_does_not_ask_for_work_says_why_first(client, world, learner):
    world.queue = stand_still(for_s=90.0)
    learner.silence = lambda: "training is paused: asked for"
    reasons = client.get("/v1/training").json()["queue"]["standstill"]["reasons"]
    assert reasons == ["e: training is paused: asked for", "e: a batch takes 3.00 GiB, and it may have 0.95 GiB"]
    assert "reason" not in client.get("/v1/training").json()
    client.app.state.executor.learner = None
    world.queue = stand_still(for_s=90.0)
    shown = client.get("/v1/training").json()
    assert (shown["enabled"], shown["reason"]) == (False, "cannot train gpt2")
    assert shown["queue"]["standstill"]["reasons"][0] == "e: training is off: cannot train gpt2"
    reply = client.post("/v1/training/pause")
    assert (reply.status_code, "cannot train gpt2" in reply.json()["error"]["message"]) == (409, True)
