import threading
import time

import pytest
import torch

from core.errors import AdapterError
from engine.training import checkpoint
from engine.training.checkpoint import CheckpointWriter, TrainingState, read_training_state

WAIT_S = 20.0


def state(number=0):
    tensors = {name: torch.full((5,), float(number)) for name in ("flat", "exp_avg", "exp_avg_sq")}
    return TrainingState({**tensors, "step": torch.tensor(float(number))}, number, {"a": [5]})


class SlowDisk:
    """Writes nothing until it is told to; says what it was asked for."""

    def __init__(self):
        self.written, self.may_write, self.in_flight, self.most_in_flight = [], threading.Semaphore(0), 0, 0
        self.started = threading.Semaphore(0)

    def __call__(self, path, state, progress):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.started.release()
        assert self.may_write.acquire(timeout=WAIT_S)
        self.written.append((path.name, state.num_steps, progress))
        self.in_flight -= 1


def test_a_submitted_state_ends_on_disk_with_its_progress(tmp_path):
    writer, path = CheckpointWriter(), tmp_path / "new" / "s.safetensors"
    submitted = state(3)
    writer.submit(path, submitted, {"cursor": 7})
    assert writer.wait(WAIT_S)
    found, progress = read_training_state(path)
    assert (found.num_steps, progress, found.shapes) == (3, {"cursor": 7}, {"a": [5]})
    assert torch.equal(found.tensors["flat"], torch.full((5,), 3.0))
    assert not submitted.is_leased
    assert not writer.is_behind()
    assert writer.take_error() is None


def test_one_write_is_in_flight_and_the_newest_waiting_state_wins(tmp_path):
    disk = SlowDisk()
    writer, states = CheckpointWriter(disk), [state(i) for i in range(4)]
    writer.submit(tmp_path / "0", states[0], {})
    assert disk.started.acquire(timeout=WAIT_S)
    for i in (1, 2, 3):
        started_s = time.perf_counter()
        writer.submit(tmp_path / str(i), states[i], {"i": i})
        assert time.perf_counter() - started_s < 1.0  # nobody waits for the disk
    assert [s.is_leased for s in states] == [True, False, False, True]
    assert writer.is_behind()
    assert not writer.wait(0.001)
    disk.may_write.release(2)
    assert writer.wait(WAIT_S)
    assert disk.written == [("0", 0, {}), ("3", 3, {"i": 3})]
    assert disk.most_in_flight == 1
    assert not any(s.is_leased for s in states)


def test_a_disk_that_hangs_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    disk = SlowDisk()
    writer = CheckpointWriter(disk)
    writer.submit(tmp_path / "0", state(), {})
    assert writer.is_behind()
    monkeypatch.setattr(checkpoint, "PATIENCE_S", 0.0)
    assert not writer.is_behind()
    disk.may_write.release()
    assert writer.wait(WAIT_S)


@pytest.mark.parametrize("error", [AdapterError("disk full"), RuntimeError("disk full"), MemoryError("disk full")])
def test_an_error_is_kept_for_one_asker_and_the_next_state_is_tried(tmp_path, error, caplog):
    outcomes = [error, error, None]

    def write(path, state, progress):
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    writer = CheckpointWriter(write)
    for i in range(3):
        submitted = state(i)
        writer.submit(tmp_path / "s", submitted, {})
        assert writer.wait(WAIT_S)
        assert not submitted.is_leased
        if i < 2:
            assert "disk full" in writer.take_error()
    assert writer.take_error() is None
    assert sum("disk full" in record.message for record in caplog.records) == 1  # not once for each step


def test_a_write_that_has_not_begun_can_be_taken_back_and_one_that_has_cannot(tmp_path):
    disk = SlowDisk()
    writer, begun, waiting = CheckpointWriter(disk), state(1), state(2)
    assert writer.take_back() is None
    writer.submit(tmp_path / "begun", begun, {})
    assert disk.started.acquire(timeout=WAIT_S)
    writer.submit(tmp_path / "waiting", waiting, {})
    assert writer.take_back() is waiting
    assert (begun.is_leased, waiting.is_leased) == (True, False)
    assert writer.take_back() is None
    disk.may_write.release(1)
    assert writer.wait(WAIT_S)
    assert [name for name, *_ in disk.written] == ["begun"]
