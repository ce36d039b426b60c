"""An engine that dies comes back inside its replica: what was under way gets an error, what comes is refused at once.

The tests run in order on one server; each leaves it serving.
"""

import asyncio
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.harness.server import ServerProcess
from benchmarks.studies.chaos.load import preferences

pytestmark = [pytest.mark.vllm, pytest.mark.ray]

CONFIG = Path(__file__).parents[2] / "serve_config.tiny.yaml"
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
REPLICA = "ServeReplica:mace:Executor"
_BACK_S = 30.0
_AT_ONCE_S = 3.0
"""For an answer that waits for nothing, on a machine that starts an engine meanwhile."""


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_cache):
    server = ServerProcess(tmp_path_factory.mktemp("restart"), CONFIG, models=model_cache / "models")
    with server.running():
        yield server


@pytest.fixture(scope="module")
def bodies():
    return preferences(0)


def ask(server, **fields):
    body = {"model": "mace-tiny", "max_tokens": 32, "temperature": 0, **QUESTION, **fields}
    return server.call("POST", "/v1/chat/completions", json=body, timeout=180)


def learning(server):
    return server.call("GET", "/v1/training").json()["executor"]


def teach(server, bodies, number):
    reply = server.call("POST", "/v1/feedback", json={"items": list(itertools.islice(bodies, number))})
    assert reply.status_code == 202


def until(condition, limit_s, pause_s=0.1):
    give_up_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < give_up_s
        time.sleep(pause_s)
    return value


def shared_memory(process):
    return {
        line.split()[-1] for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines() if "/psm_" in line
    }


def stream(server, begun):
    """The events of a long stream, until it ends; `begun` gets the first."""
    body = {"model": "mace-tiny", "n": 8, "max_tokens": 1500, "ignore_eos": True, "stream": True, **QUESTION}
    events = []
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=180) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: "):
                events.append(line[6:])
                begun.append(events[0])
    return events


def at_once(server, method, path, **options):
    started_s = time.monotonic()
    reply = server.call(method, path, **options)
    assert time.monotonic() - started_s < _AT_ONCE_S
    return reply


def test_a_version_is_learnt(server, bodies):
    teach(server, bodies, 120)
    until(lambda: server.call("GET", "/ready").json()["live"] != "base", 240, 1.0)


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker"])
def test_an_engine_that_is_killed_comes_back_in_the_same_replica(server, bodies, victim):
    number = learning(server)["engine"]["deaths"] + 1
    live = server.call("GET", "/ready").json()["live"]
    assert server.call("POST", f"/v1/adapters/{live}/activate", json={"pin": True}).status_code == 200
    before = ask(server).json()
    old = {name: server.find(name) for name in (REPLICA, "VLLM::EngineCore", "VLLM::Worker")}
    memory = shared_memory(old["VLLM::EngineCore"])
    assert memory
    begun = []
    with ThreadPoolExecutor() as pool:
        streaming = pool.submit(stream, server, begun)
        waiting = pool.submit(ask, server, n=64, temperature=1, max_tokens=1500, ignore_eos=True)
        until(lambda: begun, 30, 0.01)
        old[victim].kill()
        died_s = time.monotonic()
        until(lambda: at_once(server, "GET", "/ready").status_code == 503, 15, 0.02)
        refused = at_once(server, "POST", "/v1/chat/completions", json={"model": "mace-tiny", **QUESTION})
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["type"] == "EngineUnavailableError"
        assert at_once(server, "GET", "/health").status_code == 200
        body = next(bodies)
        assert at_once(server, "POST", "/v1/feedback", json=body).status_code == 202
        death = at_once(server, "GET", "/v1/training").json()["executor"]["engine"]
        assert (death["state"], death["deaths"]) == ("restarting", number)
        assert json.loads(begun[0])["id"] in death["last_death"]["request_ids"]
        last = json.loads(streaming.result()[-1])
        assert last["error"]["type"] == "EngineUnavailableError"
        assert waiting.result().status_code == 503
    until(lambda: ask(server, max_tokens=1).status_code == 200, 120)
    away_s = time.monotonic() - died_s
    assert away_s < _BACK_S, f"load {psutil.getloadavg()}"
    assert server.call("GET", "/ready").status_code == 200
    after = ask(server).json()
    assert (after["model"], after["choices"]) == (before["model"], before["choices"])
    assert after["model"] == f"mace-tiny@{live}"
    assert old[REPLICA] == server.find(REPLICA)
    assert not any(old[name].is_running() for name in ("VLLM::EngineCore", "VLLM::Worker"))
    assert not any(Path(path).exists() for path in memory)
    engine = learning(server)["engine"]
    assert (engine["state"], engine["deaths"]) == ("serving", number)
    assert "exit code" in engine["last_death"]["reason"]
    assert f'mace_engine_deaths_total{{component="executor"}} {number}.0' in server.call("GET", "/metrics").text


def test_training_goes_on_where_it_was(server, bodies):
    assert server.call("DELETE", "/v1/adapters/pin").status_code == 200
    steps = learning(server)["total_steps"]
    assert steps > 0
    deaths = learning(server)["engine"]["deaths"]
    teach(server, bodies, 60)
    until(lambda: learning(server)["phase"] == "training", 120, 0.02)
    server.find("VLLM::Worker").kill()
    until(lambda: learning(server)["engine"]["deaths"] == deaths + 1, 10)
    after = until(lambda: (now := learning(server))["total_steps"] > steps + 2 and now, 180, 0.5)
    assert after["started_at"] == learning(server)["started_at"]
    assert server.call("GET", "/v1/training").json()["store"]["pairs"]["parked"] == 0


def test_an_engine_that_does_not_come_back_ends_the_replica(server):
    live = server.call("GET", "/ready").json()["live"]
    replica, models = server.find(REPLICA), server.state_dir / "models"
    models.rename(models.with_name("away"))
    server.find("VLLM::EngineCore").kill()
    until(lambda: not replica.is_running() or replica.status() == psutil.STATUS_ZOMBIE, 180)
    models.with_name("away").rename(models)
    until(lambda: server.find(REPLICA, but=replica), 60)
    asyncio.run(server.wait_until_ready())
    assert ask(server).json()["model"] >= f"mace-tiny@{live}"
