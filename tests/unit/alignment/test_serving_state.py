"""What is live, pinned and on trial, and the log of it: durable, one writer, whole after a crash."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from alignment.versions.lineage import is_rollback, lineage_row, lineage_rows
from alignment.versions.registry import AdapterRegistry
from alignment.versions.serving_state import Activation, ActivationLog
from core.errors import AdapterError, DamagedAdapterError, UnknownVersionError
from tests.support.adapter_versions import ROOT, commit, truncate


@pytest.fixture
def adapters(tmp_path):
    registry = AdapterRegistry.open(tmp_path / "adapters", base_model="tiny")
    for parent in (None, "v0001", "v0002"):
        commit(registry, parent=parent)
    return registry


def events(adapters):
    fresh = AdapterRegistry(adapters.root, "tiny")  # what a new process reads
    return [(entry.event, entry.version, entry.by) for entry in fresh.serving.activations()]


def test_activations_are_logged_with_who_and_why(adapters):
    state = adapters.serving
    state.activate("v0001", by="gate", reason="accuracy 1.0")
    state.activate(None, by="api", reason="bad answers", pin=True)
    first, second = AdapterRegistry.open(adapters.root, "tiny").serving.activations()
    assert (first.version, first.previous, first.by, first.reason) == ("v0001", "base", "gate", "accuracy 1.0")
    assert (second.version, second.previous, second.pinned) == ("base", "v0001", True)
    assert first.time <= second.time


def test_while_pinned_the_gate_moves_nothing_and_says_so(adapters):
    state = adapters.serving
    state.activate("v0001", pin=True)
    assert not state.activate("v0002", by="gate", reason="accuracy 1.0")
    assert not state.start_canary("v0003")
    again = AdapterRegistry.open(adapters.root, "tiny").serving
    assert (again.read().live, again.read().pinned, again.read().canary) == ("v0001", "v0001", None)
    assert again.activations()[-2].reason == "v0001 is pinned. accuracy 1.0"
    assert again.release_pin()
    assert not again.release_pin()
    assert state.activate("v0002", by="gate")
    assert state.read().live == "v0002"
    assert [event for event, _, _ in events(adapters)] == ["activated", "held", "held", "released", "activated"]


def test_an_activation_without_a_pin_ends_the_pin(adapters):
    adapters.serving.activate(None, pin=True)
    assert adapters.serving.read().pinned == "base"
    adapters.serving.activate("v0003")
    assert adapters.serving.read().pinned is None


def test_a_canary_goes_live_or_is_never_offered_again(adapters):
    state = adapters.serving
    state.activate("v0001", by="gate")
    assert state.start_canary("v0002")
    assert state.read().training_base == "v0002"
    assert not state.start_canary("v0003")  # one trial at a time
    assert state.canary_since_s() == pytest.approx(state.activations()[1].time)
    assert state.roll_back("v0002", reason="thumbs down")
    assert not state.roll_back("v0002", reason="again")
    assert not state.activate("v0002", by="canary")  # its trial is over
    assert state.rolled_back() == {"v0002": "thumbs down"}
    assert state.start_canary("v0003")
    assert state.activate("v0003", by="canary", reason="not worse")
    assert state.read().canary is None
    assert state.read().live == "v0003"
    truncate(adapters.root / "v0003" / "adapter_model.safetensors")
    assert adapters.recover_live().name == "v0001"  # not the one that was rolled back
    state.activate("v0002")  # by hand it may
    assert state.rolled_back() == {}


def test_an_activation_by_hand_ends_the_trial_of_another_version(adapters):
    adapters.serving.start_canary("v0002")
    adapters.serving.activate("v0001")
    assert adapters.serving.read().canary is None
    assert adapters.serving.rolled_back() == {"v0002": "v0001 was made live during the trial"}
    adapters.serving.start_canary("v0003")
    adapters.serving.activate("v0003")
    assert "v0003" not in adapters.serving.rolled_back()


def test_a_version_that_cannot_be_used_goes_nowhere(adapters):
    commit(adapters, status="rejected")
    for name, error in [("v0004", AdapterError), ("v0009", UnknownVersionError)]:
        for move in (adapters.serving.activate, adapters.serving.start_canary):
            with pytest.raises(error):
                move(name)
    truncate(adapters.root / "v0002" / "adapter_model.safetensors")
    with pytest.raises(DamagedAdapterError):
        adapters.serving.start_canary("v0002")
    assert events(adapters) == []


def test_a_canary_that_was_damaged_meanwhile_ends_at_the_next_start(adapters):
    adapters.serving.start_canary("v0002")
    truncate(adapters.root / "v0002" / "adapter_model.safetensors")
    again = AdapterRegistry.open(adapters.root, "tiny")
    assert again.serving.read().canary is None
    assert "v0002" in again.serving.rolled_back()


@pytest.mark.parametrize("torn", [b'{"time": 1, "ev', b"\xff\xfe", b'{"event": "activated"}\n', b"\n\n"])
def test_a_torn_line_is_ignored_and_the_next_one_is_whole(adapters, torn):
    adapters.serving.activate("v0001")
    with (adapters.root / "activations.jsonl").open("ab") as file:
        file.write(torn)
    assert [event for event, *_ in events(adapters)] == ["activated"]
    adapters.serving.activate("v0002")
    assert [version for _, version, _ in events(adapters)] == ["v0001", "v0002"]
    assert [entry.version for entry in adapters.serving.activations()] == ["v0001", "v0002"]


def test_a_full_disk_moves_nothing_and_leaves_the_log_as_it_was(adapters, monkeypatch):
    adapters.serving.activate("v0001")
    before = (adapters.root / "activations.jsonl").read_bytes()

    def full(_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(AdapterError, match="No space left"):
            adapters.serving.activate("v0002")
    assert (adapters.root / "activations.jsonl").read_bytes() == before
    assert adapters.serving.read().live == "v0001"
    adapters.serving.activate("v0002")
    assert adapters.serving.read().live == "v0002"


CRASH = """
import os, sys
from pathlib import Path
from alignment.versions import serving_state
from alignment.versions.registry import AdapterRegistry

adapters = AdapterRegistry.open(Path(sys.argv[1]), "tiny")
adapters.serving.activate("v0001", pin=True)
allowed, real = int(sys.argv[2]), serving_state.write_atomically
def write(*args):
    global allowed
    if not allowed:
        os._exit(9)
    allowed -= 1
    real(*args)
serving_state.write_atomically = write
adapters.serving.activate("v0002", pin=True)
"""


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_process_that_dies_between_two_pointers_leaves_them_consistent(adapters, allowed):
    command = [sys.executable, "-c", CRASH, str(adapters.root), str(allowed)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    state = AdapterRegistry.open(adapters.root, "tiny").serving
    now = state.read()
    assert now.live == now.pinned == "v0001"
    activated = [entry for entry in state.activations() if entry.event == "activated"]
    assert (activated[-1].version, activated[-1].by) == ("v0001", "recovery")


def test_threads_and_processes_that_race_leave_one_whole_line_each(adapters):
    others = [adapters, AdapterRegistry.open(adapters.root, "tiny")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: others[i % 2].serving.activate(f"v000{1 + i % 3}"), range(24)))
    entries = adapters.serving.activations()
    assert len(entries) == 24
    assert entries[-1].version == adapters.serving.read().live
    for before, after in itertools.pairwise(entries):
        assert after.previous == before.version


def test_the_log_is_read_on_from_where_it_was_left(tmp_path):
    log = ActivationLog(tmp_path / "log")
    assert log.read() == ()
    for number in range(3):
        log.append(Activation(time=number, event="activated", version=f"v000{number}", by="gate"))
        assert [entry.version for entry in log.read()] == [f"v000{i}" for i in range(number + 1)]
    line = Activation(time=3, event="activated", version="v0003", by="gate").model_dump_json().encode() + b"\n"
    with (tmp_path / "log").open("ab", buffering=0) as file:
        for part in (line[:20], line[20:]):  # read while another process writes it
            assert len(log.read()) == 3
            file.write(part)
    assert len(log.read()) == 4
    (tmp_path / "log").write_text("")
    assert log.read() == ()


def test_the_lineage_tells_who_made_a_version_live_and_what_became_of_it(adapters):
    adapters.serving.activate("v0001", by="gate", reason="good")
    adapters.serving.start_canary("v0002")
    adapters.serving.roll_back("v0002", reason="too slow")
    adapters.serving.activate("v0001", by="api", reason="sure", pin=True)
    truncate(adapters.root / "v0003" / "adapter_model.safetensors")
    first, second, third = lineage_rows(adapters)
    assert (first["live"], first["pinned"], first["activated_by"], first["activation_reason"]) == (
        True,
        True,
        "api",
        "sure",
    )
    assert (second["status"], second["reason"], second["activated_at"]) == ("rolled_back", "too slow", None)
    assert (second["parent"], second["num_pairs"], second["optimizer_steps"]) == ("v0001", 1, 8)
    assert (third["status"], third["live"]) == ("damaged", False)
    full = lineage_row(adapters, "v0002")
    assert [entry["event"] for entry in full["activations"]] == ["canary", "rolled_back"]
    assert lineage_row(adapters, "base")["status"] == "base"
    with pytest.raises(UnknownVersionError):
        lineage_row(adapters, "v0009")


def test_going_back_is_told_from_going_forward(adapters):
    assert is_rollback(adapters, "base")
    assert is_rollback(adapters, "v0002")
    assert not is_rollback(adapters, "v0003")
    adapters.serving.start_canary("v0003")
    adapters.serving.roll_back("v0003", reason="slow")
    assert not is_rollback(adapters, "v0002")  # nothing good is newer


def test_the_gate_does_not_replace_a_version_that_it_did_not_compare_with(adapters):
    """Two executors gate at the same time: the second one's candidate was judged against what is not live any more."""
    state = adapters.serving
    assert state.activate("v0001", by="gate", over="base")
    assert not state.activate("v0002", by="gate", over="base", reason="accuracy 1.0")
    assert state.read().live == "v0001"
    assert events(adapters)[-1] == ("held", "v0002", "gate")
    assert state.activate("v0003", by="gate", over="v0001")
    assert not state.start_canary("v0002", over="v0001")  # nor is it put on trial against another
    assert state.start_canary("v0002", over="v0003")
