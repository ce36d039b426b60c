"""`mace chaos` on a real server: a few kills lose nothing, and an interrupted run leaves nothing behind."""

import json
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.harness.server import title_of

pytestmark = [pytest.mark.vllm, pytest.mark.ray]

ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable,
    "-c",
    "import typer; from benchmarks.studies.chaos.command import chaos; typer.run(chaos)",
]


@pytest.fixture
def start_chaos(model_cache, tmp_path):
    started = []

    def start(*arguments):
        errors = (tmp_path / "stderr").open("wb")
        state = ["--state-dir", model_cache, "--keep-state", tmp_path / "kept"]
        command = [*COMMAND, "--json", *state, *arguments]
        chaos = psutil.Popen(command, cwd=ROOT, stdout=(tmp_path / "stdout").open("wb"), stderr=errors)
        started.append(chaos)
        return chaos

    yield start
    for chaos in started:
        if chaos.is_running():
            chaos.terminate()
            chaos.wait(120)


@pytest.mark.slow
def test_nothing_is_lost_when_an_engine_and_the_store_owner_are_killed(start_chaos, tmp_path):
    chaos = start_chaos("--kills", "2", "--kinds", "engine,monitor", "--seed", "1")
    code = chaos.wait(400)
    assert code == 0, (tmp_path / "stderr").read_text()
    report = json.loads((tmp_path / "stdout").read_text())
    assert report["kills_by_kind"] == {"engine": 1, "monitor": 1}
    assert report["feedback"]["acknowledged"] > 20
    assert (report["feedback"]["lost"], report["feedback"]["duplicated"]) == (0, 0)
    assert report["versions"]["half_written"] == {}
    assert report["left_behind"] == 0
    assert 1 < report["recovery_s"]["engine"]["max"] < 100  # a new engine loads the model, in the same replica
    assert report["requests"]["sent"] > 20


def test_an_interrupted_run_ends_its_server(start_chaos, tmp_path):
    chaos = start_chaos("--kills", "1", "--kinds", "monitor")
    give_up_s = time.monotonic() + 60
    while not any("raylet" in title_of(process) for process in chaos.children(recursive=True)):
        assert time.monotonic() < give_up_s
        time.sleep(0.2)
    family = chaos.children(recursive=True)
    chaos.send_signal(signal.SIGINT)
    assert chaos.wait(120) != 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
