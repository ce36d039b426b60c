import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import typer
from typer.testing import CliRunner

from app.commands.processes import is_alive
from benchmarks.harness.server import ServerError, ServerProcess, own_servers, title_of
from benchmarks.studies.chaos.command import Options, chaos, new_directories, run
from benchmarks.studies.chaos.strike import KINDS, MOMENTS, TARGETS, make_plan


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
    app = typer.Typer()
    app.command()(chaos)
    result = CliRunner().invoke(app, ["--kinds", text], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "kinds are executor" in result.output


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
    handler = signal.getsignal(signal.SIGTERM)
    own_servers()
    server = ServerProcess(tmp_path / "run", config, ray_dir=tmp_path, command=command)
    yield server
    server.end(None)
    signal.signal(signal.SIGTERM, handler)
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # no subreaper any more


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
            with pytest.raises(ServerError, match="does not descend"):
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
    with pytest.raises(ServerError, match="must be ended"):
        server.launch()
    assert server.end(None) >= 1
    assert not is_alive(child)
    server.launch()
    assert not server.has_exited


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_its_server(server, number):
    options = Options(make_plan(1, 0), seed=0, max_s=60.0, rate_per_s=1.0, feedback_interval_s=1.0)
    seen = []

    def interrupt():
        seen.extend([server.root, wait_for(lambda: server.find("VLLM::Child"))])
        os.kill(os.getpid(), number)

    threading.Thread(target=lambda: (wait_for(lambda: not server.has_exited), interrupt())).start()
    with pytest.raises(KeyboardInterrupt):
        run(server, options)
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
    with pytest.raises(ServerError, match="wants a new directory"), new_directories(tmp_path):
        pass
    with new_directories(None) as (directory, ray_dir):
        assert directory.is_dir()
    assert not ray_dir.exists()


class UntitledProcess:
    """What `title_of` asks a `psutil.Process`."""

    def __init__(self, command, owner=None):
        self._command, self._owner = command, owner

    def cmdline(self):
        return self._command

    def parent(self):
        return self._owner


def test_processes_of_vllm_without_a_title_are_named_by_descent():
    spawned = ["python", "-B", "-c", "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=81)"]
    replica = UntitledProcess(["ray::ServeReplica:mace:Executor"])
    engine = UntitledProcess(spawned, replica)
    assert title_of(engine) == "VLLM::EngineCore"
    assert title_of(UntitledProcess(spawned, engine)) == "VLLM::Worker"
    assert title_of(UntitledProcess(spawned, UntitledProcess(["VLLM::EngineCore"]))) == "VLLM::Worker"
    assert title_of(UntitledProcess(spawned, UntitledProcess(["bash"]))).startswith("python")
    assert title_of(UntitledProcess(["VLLM::Worker"], replica)) == "VLLM::Worker"
