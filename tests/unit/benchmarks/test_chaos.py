import asyncio
import ctypes
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from openai import AsyncOpenAI
from typer import BadParameter

from alignment.adapter_files import AdapterManifest
from alignment.registry import AdapterRegistry
from benchmarks.chaos import _directories, _ended_by_sigterm, _Options, _parse_kinds, _run
from benchmarks.chaos_ledger import Audit, Ledger, preferences
from benchmarks.chaos_load import ChatLoad, ChatRequest, FeedbackLoad, export_all_pairs, read_all_feedback
from benchmarks.chaos_plan import KINDS, MOMENTS, TARGETS, make_plan
from benchmarks.chaos_report import Findings, downtime_s, failures_by_kill, make_report
from benchmarks.chaos_server import ChaosError, ServerProcess, is_alive
from benchmarks.chaos_strike import Kill, count_lost_steps
from benchmarks.chaos_watch import Learning, SavedTraining, VersionWatch, read_checkpoint

# --- the plan ---


def test_every_kind_is_hit_once_before_any_is_hit_twice():
    plan = make_plan(3 * len(KINDS), seed=5)
    for first in range(0, len(plan), len(KINDS)):
        assert {strike.kind for strike in plan[first : first + len(KINDS)]} == set(KINDS)


def test_every_kind_meets_every_moment_and_the_head_loses_each_of_its_processes():
    plan = make_plan(len(KINDS) * len(MOMENTS), seed=1)
    for kind in KINDS:
        assert {strike.moment for strike in plan if strike.kind == kind} == set(MOMENTS)
    assert {strike.target for strike in plan if strike.kind == "head"} == set(TARGETS["head"])


def test_the_seed_decides_the_plan():
    assert make_plan(20, seed=3) == make_plan(20, seed=3)
    assert make_plan(20, seed=3) != make_plan(20, seed=4)


def test_a_plan_keeps_to_the_kinds_asked_for():
    assert {strike.kind for strike in make_plan(9, 0, ("engine", "head"))} == {"engine", "head"}


@pytest.mark.parametrize("text", ["engine,gpu", "", " , "])
def test_unknown_kinds_are_refused(text):
    with pytest.raises(BadParameter, match="kinds are executor"):
        _parse_kinds(text)


# --- the ledger ---


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


# --- the server's processes ---

_FAMILY = """
import subprocess, sys, time
if sys.argv[1] == "parent":
    subprocess.Popen([sys.executable, __file__, "VLLM::Child", "x"], start_new_session=True)
time.sleep(60)
"""


@pytest.fixture
def server(tmp_path):
    """A family of two processes instead of a real server; orphans come to us meanwhile."""
    config, script = tmp_path / "config.yaml", tmp_path / "family.py"
    config.write_text("applications: [{name: mace, args: {}}]\n")
    script.write_text(_FAMILY)
    (tmp_path / "run").mkdir()
    command = [sys.executable, script, "parent"]
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)
    server = ServerProcess(tmp_path / "run", config, tmp_path / "models", tmp_path, command=command)
    yield server
    server.end(politely=False)
    libc.prctl(36, 0, 0, 0, 0)


def wait_for(condition, limit_s=10):
    give_up_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < give_up_s
        time.sleep(0.05)
    return found


def test_only_descendants_of_the_server_are_killed(server):
    server.launch()
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "VLLM::Child"])
    try:
        child = wait_for(lambda: server.find("VLLM::Child"))
        assert child.pid != stranger.pid
        for other in (psutil.Process(stranger.pid), psutil.Process(os.getpid())):
            with pytest.raises(ChaosError, match="does not descend"):
                server.kill(other)
        assert stranger.poll() is None
        server.kill(child)
        wait_for(lambda: not is_alive(child))
        assert server.find("VLLM::Child") is None
    finally:
        stranger.kill()
        stranger.wait()


def test_orphans_of_a_killed_server_are_found_and_ended_before_the_next_one_starts(server):
    server.launch()
    child = wait_for(lambda: server.find("VLLM::Child"))
    server.kill(server.root)
    wait_for(lambda: server.has_exited)
    assert server.members() == []
    assert server.family() == [child]
    with pytest.raises(ChaosError, match="must be ended"):
        server.launch()
    assert server.end(politely=False) >= 1
    assert not is_alive(child)
    server.launch()
    assert not server.has_exited


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_its_server(server, number):
    options = _Options(make_plan(1, 0), seed=0, max_s=60.0, rate_per_s=1.0, feedback_interval_s=1.0)
    seen = []

    def interrupt():
        seen.extend([server.root, wait_for(lambda: server.find("VLLM::Child"))])
        os.kill(os.getpid(), number)

    threading.Thread(target=lambda: (wait_for(lambda: not server.has_exited), interrupt())).start()
    with _ended_by_sigterm(), pytest.raises(KeyboardInterrupt):
        _run(server, options)
    assert len(seen) == 2
    assert not any(is_alive(process) for process in seen)


def test_the_server_gets_a_state_and_a_ray_of_its_own(server, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "somebody-elses:6379")
    server.launch()
    wait_for(lambda: server.find("VLLM::Child"))  # before, the environment may be that of the fork
    environment = server.root.environ()
    assert "RAY_ADDRESS" not in environment
    assert environment["RAY_TMPDIR"] == str(tmp_path)
    written = (tmp_path / "run" / "serve_config.yaml").read_text()
    assert f"state_dir: {tmp_path / 'run' / 'state'}" in written
    assert f"port: {server.url.rpartition(':')[2]}" in written


def test_a_directory_that_exists_is_nobodys_scratch(tmp_path):
    with pytest.raises(ChaosError, match="wants a new directory"), _directories(tmp_path):
        pass
    with _directories(None) as (directory, ray_dir):
        assert directory.is_dir()
    assert not ray_dir.exists()


# --- what can be seen of versions and training ---


def safetensors(header, data=b"\0" * 8):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


TENSOR = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.fixture
def registry(tmp_path):
    return AdapterRegistry.open(tmp_path / "adapters", "model")


@pytest.fixture
def version(registry):
    directory = registry.begin()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(safetensors(TENSOR))
    return registry.commit(directory, AdapterManifest(base_model="model"))


def test_a_whole_version_is_seen_and_one_in_the_making_is_not(registry, version):
    registry.begin()
    registry.activate(version.name)
    watch = VersionWatch(registry.root)
    watch.look()
    assert (watch.seen, watch.half_written, watch.looks) == (["v0001"], {}, 1)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "manifest.json", "adapter_config.json"])
def test_a_version_that_misses_a_part_is_half_written(registry, version, name):
    content = (version.path / name).read_bytes()
    (version.path / name).write_bytes(content[:-2])
    watch = VersionWatch(registry.root)
    watch.look()
    assert list(watch.half_written) == ["v0001"]


def test_weights_that_change_after_they_were_visible_are_noticed(registry, version):
    watch = VersionWatch(registry.root)
    watch.look()
    (version.path / "adapter_model.safetensors").write_bytes(safetensors(TENSOR, b"\1" * 8))
    watch.look()
    assert "changed" in watch.half_written["v0001"]


def test_a_live_pointer_into_nothing_is_noticed(registry, version):
    (registry.root / "live").write_text("v0007\n")
    watch = VersionWatch(registry.root)
    watch.look()
    assert list(watch.half_written) == ["live -> v0007"]


def test_a_version_listed_as_damaged_is_half_written(tmp_path):
    watch = VersionWatch(tmp_path)
    rows = [
        {"version": "v0001", "status": "published"},
        {"version": "v0002", "status": "damaged", "reason": "torn"},
    ]
    watch.note_listing({"data": rows})
    assert list(watch.half_written) == ["v0002"]


def test_the_checkpoint_tells_its_steps(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    assert read_checkpoint(path) is None
    mace = {"num_steps": 4, "progress": {"total_steps": 19, "steps_since_candidate": 3, "base": "v0002"}}
    path.write_bytes(safetensors({**TENSOR, "__metadata__": {"mace": json.dumps(mace)}}))
    assert read_checkpoint(path) == SavedTraining(19, 3, "v0002")
    path.write_bytes(safetensors({**TENSOR, "__metadata__": {"mace": json.dumps({"num_steps": 4})}}))
    assert read_checkpoint(path) == SavedTraining(4)
    path.write_bytes(path.read_bytes()[:30])
    assert read_checkpoint(path) is None


def learning(started_at=1.0, steps=5, total=25, restored=20, since=5, live="v0001", decided=False):
    return Learning(started_at, "training", steps, total, restored, since, live, decided)


SAVED = SavedTraining(25, 5, "v0001")


@pytest.mark.parametrize(
    ("first", "lost"),
    [
        (learning(), 0),  # the same process
        (learning(2.0, steps=1, total=26, restored=25, since=6), 0),
        (learning(2.0, steps=0, total=24, restored=24, since=4), 1),
        (learning(2.0, steps=0, total=20, restored=20, since=0), 5),
        (learning(2.0, steps=2, total=27, restored=25, since=2), 5),  # counts on, but began from the live version
        (learning(2.0, steps=2, total=27, restored=25, since=2, live="v0002"), 0),  # published when it died
        (learning(2.0, steps=4, total=29, restored=25, since=1, decided=True), 0),
        (learning(2.0, steps=1, total=None, restored=None, since=None), None),
    ],
)
def test_lost_steps_are_those_done_before_and_not_gone_on_from(first, lost):
    assert count_lost_steps(learning(), SAVED, first) == lost


def test_a_step_that_only_the_checkpoint_knows_counts_as_done():
    first = learning(2.0, steps=0, total=24, restored=24, since=4)
    assert count_lost_steps(learning(total=24), SAVED, first) == 1
    assert count_lost_steps(None, None, first) is None


def test_a_status_without_totals_is_read_as_such():
    assert Learning.from_wire({"enabled": False, "executor": {}}) is None
    bare = {"started_at": 1.0, "phase": "idle", "steps": 3}
    assert Learning.from_wire({"executor": bare}).restored_steps is None
    assert Learning.from_wire({"executor": {**bare, "total_steps": 10}}).restored_steps == 7


# --- the load ---


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
            load = ChatLoad(client, "mace-tiny", 1.0, random.Random(0))
            load.send()
            await load.drain(5)
            return load.requests

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
    monkeypatch.setattr("benchmarks.chaos_load._REPEAT_PAUSE_S", 0.0)
    app, stored = feedback_app(fail_first=3)

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            load = FeedbackLoad(client, preferences(0), 0.0)
            for _ in range(8):  # the eighth is a list of three
                await load.post_next()
            audit = load.ledger.audit(await read_all_feedback(client), await export_all_pairs(client))
            return load.ledger, audit

    ledger, audit = asyncio.run(run())
    assert ledger.repeats == 3
    assert ledger.answers == {"503": 3, "202": 8}
    assert ledger.acknowledged == set(stored)
    assert (audit.acknowledged, audit.lost, audit.duplicated) == (10, [], [])


def test_a_refused_record_is_not_repeated():
    app, _ = feedback_app(fail_first=0)

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            load = FeedbackLoad(client, iter([{"id": "refuse-1"}]), 0.0)
            await load.post_next()
            return load.ledger

    ledger = asyncio.run(run())
    assert (list(ledger.refused), ledger.repeats, ledger.acknowledged) == (["refuse-1"], 0, set())


# --- the report ---


def a_kill(number=1, struck_s=100.0, **changes):
    values = {"recovery_s": 3.0, "training_s": 4.0, "steps_lost": 0, **changes}
    return Kill(number, "engine", "VLLM::EngineCore", "request", struck_s, **values)


def findings(tmp_path, **changes):
    audit = Audit(acknowledged=10, in_doubt=0, in_doubt_stored=0, lost=[], duplicated=[], unknown=0)
    values = {
        "seed": 0,
        "duration_s": 60.0,
        "planned": 1,
        "stopped": None,
        "kills": [a_kill()],
        "requests": [ChatRequest(90.0, 91.0), ChatRequest(99.0, 101.0, "APIError: broken")],
        "ledger": Ledger(),
        "audit": audit,
        "versions": VersionWatch(tmp_path),
        "restarts": 0,
        "left_behind": 0,
        **changes,
    }
    return Findings(**values)


def test_a_run_that_lost_nothing_passes(tmp_path):
    report = make_report(findings(tmp_path))
    assert (report["passed"], report["problems"]) == (True, [])
    assert report["requests"]["failed"] == 1
    assert report["requests"]["failed_share"] == 0.5
    assert report["requests"]["errors"] == {"APIError": 1}
    assert report["recovery_s"]["engine"] == {"count": 1, "p50": 3.0, "p90": 3.0, "max": 3.0}
    assert json.loads(json.dumps(report)) == report


def half_written(tmp_path):
    watch = VersionWatch(tmp_path)
    watch.half_written["v0003"] = "torn"
    return watch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"audit": Audit(10, 0, 0, ["a"], [], 0)}, "1 acknowledged records are lost"),
        ({"audit": Audit(10, 0, 0, [], ["a"], 0)}, "there twice"),
        ({"audit": Audit(10, 0, 0, [], [], 2)}, "nobody sent"),
        ({"ledger": Ledger(refused={"a": "empty"})}, "1 records were refused, the first: ('a', 'empty')"),
        ({"kills": [a_kill(steps_lost=2)]}, "2 optimizer steps were lost"),
        ({"kills": [a_kill(recovery_s=None)]}, "no recovery in time after kills [1]"),
        ({"kills": [a_kill(training_s=None)]}, "no training in time after kills [1]"),
        ({"kills": []}, "no kill"),
        ({"stopped": "no process 'x'"}, "the run was stopped: no process 'x'"),
        ({"left_behind": 1}, "outlived"),
    ],
)
def test_every_kind_of_loss_fails_the_run(tmp_path, changes, words):
    report = make_report(findings(tmp_path, **changes))
    assert not report["passed"]
    [problem] = report["problems"]
    assert words in problem


def test_a_half_written_version_fails_the_run(tmp_path):
    [problem] = make_report(findings(tmp_path, versions=half_written(tmp_path)))["problems"]
    assert "v0003" in problem


def test_one_lost_step_is_allowed_and_an_unknown_number_is_none(tmp_path):
    assert make_report(findings(tmp_path, kills=[a_kill(steps_lost=1)]))["passed"]
    assert make_report(findings(tmp_path, kills=[a_kill(steps_lost=None)]))["steps_lost_max"] is None


def test_failures_are_counted_with_the_last_kill_before_them():
    kills = [a_kill(1, 100.0), a_kill(2, 200.0)]
    ends = [(50.0, "x"), (150.0, "x"), (210.0, "x"), (220.0, None), (None, None)]
    requests = [ChatRequest(40.0, end, error) for end, error in ends]
    assert failures_by_kill(kills, requests) == {0: 1, 1: 1, 2: 2}


def test_downtime_is_the_longest_time_without_an_answer_until_recovery():
    requests = [ChatRequest(90.0, 99.0), ChatRequest(100.1, 100.5), ChatRequest(100.2, 107.0, "broken")]
    requests += [ChatRequest(101.0, 108.5), ChatRequest(109.0, 130.0)]
    assert downtime_s(a_kill(struck_s=100.0, recovery_s=10.0), requests) == pytest.approx(8.0)
    assert downtime_s(a_kill(struck_s=100.0, recovery_s=10.0), []) == pytest.approx(10.0)
    assert downtime_s(a_kill(recovery_s=None), requests) is None
