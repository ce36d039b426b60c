import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.monitors.engine_keeper import MAX_STARTS, EngineKeeper

ROOT = Path(__file__).parents[3]


class Engine:
    """Dies when told to; the first `num_failures` starts fail."""

    def __init__(self, num_failures=0):
        self.is_dead = False
        self.num_failures = num_failures
        self.starts = 0
        self.num_lost = 0

    def has_lost_worker(self):
        return False

    def lose(self):
        self.num_lost += 1
        return ["chatcmpl-1", "finetune-2"]

    async def end_processes(self):
        return "EngineCore ended with exit code -9"

    async def restart(self):
        self.starts += 1
        if self.starts <= self.num_failures:
            raise RuntimeError("no memory")
        self.is_dead = False


class Gone(Exception):
    """The replica has ended."""


class Replica:
    """What stands around the keeper, with a clock of its own."""

    def __init__(self, monkeypatch, engine):
        monkeypatch.setattr("deployments.monitors.engine_keeper.asyncio.sleep", self._sleep)
        self.engine = engine
        self.now_s = 1000.0
        self.events = []
        self.keeper = EngineKeeper(
            engine, lambda: self.events.append("death"), self._resume, self._give_up, lambda: self.now_s
        )

    async def _sleep(self, seconds):
        self.now_s += seconds
        if not self.engine.is_dead:
            raise asyncio.CancelledError

    async def _resume(self):
        self.events.append("resume")

    def _give_up(self, reason):
        raise Gone(reason)

    def look(self):
        """Until the engine serves."""
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self.keeper.run())

    def kill(self, lived_s):
        self.now_s += lived_s
        self.engine.is_dead = True
        self.look()


def test_a_death_is_told_once_and_shown_with_the_requests_that_were_under_way(monkeypatch):
    replica = Replica(monkeypatch, Engine())
    assert replica.keeper.to_wire() == {"state": "serving", "deaths": 0, "last_death": None}
    replica.engine.is_dead = True
    replica.keeper.note_death()
    replica.keeper.note_death()
    assert replica.events == ["death"]
    assert replica.keeper.to_wire()["state"] == "restarting"
    assert replica.keeper.to_wire()["last_death"]["away_s"] is None
    replica.look()
    assert replica.events == ["death", "resume"]
    shown = replica.keeper.to_wire()
    assert (shown["state"], shown["deaths"]) == ("serving", 1)
    assert shown["last_death"]["request_ids"] == ["chatcmpl-1", "finetune-2"]
    assert shown["last_death"]["reason"] == "EngineCore ended with exit code -9"


def test_an_engine_that_dies_before_it_serves_fails_what_waits_for_it_and_is_the_same_death(monkeypatch):
    replica = Replica(monkeypatch, Engine())
    replica.keeper.note_death()
    assert replica.engine.num_lost == 1
    replica.keeper.note_death()
    assert (replica.engine.num_lost, replica.keeper.num_deaths, replica.events) == (2, 1, ["death"])


def test_a_start_that_fails_is_repeated(monkeypatch):
    replica = Replica(monkeypatch, Engine(num_failures=2))
    replica.kill(lived_s=0)
    assert (replica.engine.starts, replica.events) == (3, ["death", "resume"])
    assert replica.keeper.to_wire()["last_death"]["away_s"] > 0


def test_starts_that_keep_failing_end_the_replica(monkeypatch):
    replica = Replica(monkeypatch, Engine(num_failures=100))
    with pytest.raises(Gone, match=f"started {MAX_STARTS} times in a row"):
        replica.kill(lived_s=1000)
    assert replica.engine.starts == MAX_STARTS


def test_an_engine_that_dies_again_and_again_ends_the_replica_and_one_that_lived_does_not(monkeypatch):
    replica = Replica(monkeypatch, Engine())
    for _ in range(10):
        replica.kill(lived_s=100)
    for _ in range(MAX_STARTS - 1):
        replica.kill(lived_s=1)
    with pytest.raises(Gone):
        replica.kill(lived_s=1)
    assert replica.keeper.num_deaths == 10 + MAX_STARTS


def test_giving_up_ends_the_process():
    script = "from deployments.monitors.engine_keeper import end_process; end_process('no engine')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"no engine" in done.stderr
