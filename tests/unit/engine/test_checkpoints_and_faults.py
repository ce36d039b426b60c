"""A step leaves a checkpoint or no trace, whatever fails in it and whenever the process is killed."""

import dataclasses
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest
import torch

from core.config import AppArgs
from core.errors import AdapterError
from core.types import Checkpoint, SliceKind, TaskKind
from engine.training.dpo import DpoStep
from engine.training.runner import FineTuneRunner
from tests.support.trainable_models import make_task, make_training, save_model
from tests.support.trainable_models import snapshot as copies

WAIT_S = 20.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=2)


def make_runner(model_dir):
    return FineTuneRunner(
        model_dir=model_dir,
        args=AppArgs(training=make_training(), lora={"rank": 4, "alpha": 8.0}),
        dtype=torch.float32,
        device=torch.device("cpu"),
        weights=None,
    )


@pytest.fixture
def runner(model_dir):
    return make_runner(model_dir)


def finish(runner):
    for _ in range(5000):
        report = runner.run(0.0, 1)
        if report.finished:
            (result,) = report.finished
            return result
        if not report.slices:
            time.sleep(1e-3)
    raise AssertionError("the task did not end")


def train(runner, step, path=None):
    """Step number `step` (from 0) of a fixed course of training."""
    checkpoint = Checkpoint(str(path), {"step": step + 1}) if path else None
    runner.submit(dataclasses.replace(make_task(2, seed=step), checkpoint=checkpoint).to_wire())
    return finish(runner)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def snapshot(runner):
    return copies(runner.shadow)


def test_a_checkpointed_step_can_be_gone_on_from_bit_by_bit(runner, model_dir, tmp_path):
    path = tmp_path / "state.safetensors"
    results = [train(runner, i, path) for i in range(3)]
    assert [result.checkpoint_error for result in results] == [None] * 3
    assert runner.shadow.checkpoints.wait(WAIT_S)
    at_3 = snapshot(runner)
    expected = [train(runner, i).metrics for i in (3, 4)]
    other = make_runner(model_dir)
    assert other.shadow.load_training_state(str(path)) == {"step": 3}
    assert same(snapshot(other), at_3)
    assert [train(other, i).metrics for i in (3, 4)] == expected
    assert same(snapshot(other), snapshot(runner))
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_hangs_costs_no_memory_and_the_newest_state_is_written(runner, tmp_path, monkeypatch):
    """Memory for two copies is taken at the start; a third would come out of what inference was promised."""
    may_write, path = threading.Event(), tmp_path / "state"
    monkeypatch.setattr("core.files.sync", lambda path: may_write.wait(WAIT_S))
    monkeypatch.setattr(runner.shadow.checkpoints, "is_behind", lambda: False)  # patience has ended
    made = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: made.append(1) or empty_like(*args, **kwargs))
    before = runner.shadow.memory()
    try:
        for step in range(4):
            assert train(runner, step, path).error is None
    finally:
        may_write.set()
    assert made == []
    assert runner.shadow.memory() == before
    assert runner.shadow.checkpoints.wait(WAIT_S)
    at_4, other = snapshot(runner), make_runner(runner.model.hf_config.name_or_path)
    assert other.shadow.load_training_state(str(path)) == {"step": 4}
    assert same(snapshot(other), at_4)


def save(shadow, path, progress):
    give_up_s = time.monotonic() + WAIT_S
    while not shadow.save_training_state(path, progress):
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


def test_nobody_waits_for_the_disk_when_a_state_is_saved(runner, tmp_path, monkeypatch):
    flushed = threading.Event()
    monkeypatch.setattr("core.files.sync", lambda path: flushed.wait(WAIT_S))
    try:
        assert [runner.shadow.save_training_state(tmp_path / "s", {"step": step}) for step in (1, 1, 2)] == [
            False
        ] * 3
        runner.shadow.save_adapter(tmp_path / "v", "base")
        assert not (tmp_path / "s").exists()
    finally:
        flushed.set()
    save(runner.shadow, tmp_path / "s", {"step": 2})
    assert runner.shadow.load_training_state(tmp_path / "s") == {"step": 2}


def test_a_state_that_cannot_be_saved_is_an_error_and_the_next_one_is_saved(runner, tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(AdapterError, match="training state cannot be written"):
        save(runner.shadow, tmp_path / "file" / "s", {})
    save(runner.shadow, tmp_path / "s", {})
    assert (tmp_path / "s").exists()


def test_a_state_saved_now_is_not_overtaken_by_an_older_checkpoint(runner, tmp_path):
    path = tmp_path / "state.safetensors"
    train(runner, 0, path)
    save(runner.shadow, path, {"published": "v0001"})
    assert runner.shadow.load_training_state(str(path)) == {"published": "v0001"}


def test_without_a_usable_file_there_is_nothing_to_restore(runner, tmp_path):
    path, partial = tmp_path / "state.safetensors", tmp_path / ".state.safetensors.partial"
    partial.write_bytes(b"of a killed process")
    assert runner.shadow.load_training_state(str(path)) is None
    assert not partial.exists()
    before = snapshot(runner)
    path.write_bytes(b"damaged")
    assert runner.shadow.load_training_state(str(path)) is None
    assert same(before, snapshot(runner))


def test_a_disk_error_is_told_with_the_next_result_and_training_goes_on(runner, model_dir, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    first = train(runner, 0, blocked / "state.safetensors")
    assert runner.shadow.checkpoints.wait(WAIT_S)
    results = [first, train(runner, 1), train(runner, 2)]
    assert [result.error for result in results] == [None] * 3
    (error,) = [result.checkpoint_error for result in results if result.checkpoint_error]
    assert error.startswith("training state cannot be written")
    assert results[2].checkpoint_error is None
    other = make_runner(model_dir)
    for i in range(3):
        train(other, i)
    assert same(snapshot(runner), snapshot(other))


def test_only_the_next_optimizer_slice_waits_for_the_checkpoint(runner, tmp_path, monkeypatch):
    train(runner, 0, tmp_path / "a")
    assert runner.shadow.checkpoints.wait(WAIT_S)
    monkeypatch.setattr(runner.shadow.checkpoints, "is_behind", lambda: True)
    task = dataclasses.replace(make_task(2, seed=1), checkpoint=Checkpoint(str(tmp_path / "a"), {}))
    runner.submit(task.to_wire())
    report = runner.run(60.0, 10_000)
    assert [s.kind for s in report.slices][-1] is SliceKind.BACKWARD_LAYER
    started_s = time.perf_counter()
    assert runner.run(60.0, 1).slices == []
    assert time.perf_counter() - started_s < 1.0
    assert runner.shadow.num_steps == 1
    monkeypatch.setattr(runner.shadow.checkpoints, "is_behind", lambda: False)
    assert [result.error for result in runner.run(60.0, 1).finished] == [None]
    assert runner.shadow.num_steps == 2


def test_loading_and_saving_mean_the_shadow_also_while_live_is_evaluated(runner, tmp_path):
    train(runner, 0)
    trained = snapshot(runner)
    runner.submit(dataclasses.replace(make_task(2, TaskKind.EVALUATE), on_live=True).to_wire())
    runner.run(0.0, 1)
    save(runner.shadow, tmp_path / "s", {})
    runner.shadow.load_adapter(None)
    finish(runner)
    assert not same(snapshot(runner), trained)
    assert runner.shadow.load_training_state(str(tmp_path / "s")) == {}
    assert same(snapshot(runner), trained)


METHODS = {
    SliceKind.EMBED: "_embed",
    SliceKind.REFERENCE_LAYER: "_reference_layer",
    SliceKind.REFERENCE_HEAD: "_reference_head",
    SliceKind.POLICY_LAYER: "_policy_layer",
    SliceKind.POLICY_HEAD: "_policy_head",
    SliceKind.LOSS: "_loss",
    SliceKind.BACKWARD_LAYER: "_backward_layer",
}


def poison(step, kind, batch):
    """Make one number that the slice has left a NaN."""
    left = {
        SliceKind.REFERENCE_HEAD: lambda: batch.reference_logps[-1],
        SliceKind.POLICY_HEAD: lambda: batch.policy_logps[-1],
        SliceKind.BACKWARD_LAYER: lambda: next(iter(step.gradients().values())),
    }.get(kind, lambda: batch.hidden)()
    left.view(-1)[0] = float("nan")


def break_slice(monkeypatch, kind, fault):
    """Let the first slice of a kind do its work and then raise or leave a NaN."""

    def fail():
        if fault == "raise":
            raise RuntimeError("injected")

    if kind is SliceKind.OPTIMIZER:
        optimizer_step = torch.optim.AdamW.step

        def broken_step(self):
            optimizer_step(self)
            with torch.no_grad():
                self.param_groups[0]["params"][0][5] = float("nan")
            fail()

        monkeypatch.setattr(torch.optim.AdamW, "step", broken_step)
        return
    method = getattr(DpoStep, METHODS[kind])

    def broken(self, batch, *args):
        method(self, batch, *args)
        fail()
        poison(self, kind, batch)

    monkeypatch.setattr(DpoStep, METHODS[kind], broken)


@pytest.mark.parametrize("fault", ["raise", "nan"])
@pytest.mark.parametrize("kind", list(SliceKind))
def test_a_fault_in_any_slice_leaves_everything_as_before_the_step(runner, model_dir, tmp_path, kind, fault):
    path = tmp_path / "state"
    train(runner, 0, path)
    before, random_numbers = snapshot(runner), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_slice(monkeypatch, kind, fault)
        result = train(runner, 1, path)
    assert result.error.startswith("RuntimeError: injected" if fault == "raise" else "DivergedError: ")
    assert result.metrics is None
    assert same(before, snapshot(runner))
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert runner.run(0.0, 0).activation_bytes == 0
    assert runner.shadow.checkpoints.wait(WAIT_S)
    other = make_runner(model_dir)
    assert other.shadow.load_training_state(str(path)) == {"step": 1}  # the failed step has written nothing
    assert train(runner, 1).metrics == train(other, 1).metrics
    assert same(snapshot(runner), snapshot(other))


def train_until_killed(runner, path, reports):
    """A process that goes on from the checkpoint and reports each step that is done."""
    progress = runner.shadow.load_training_state(str(path))
    step = progress["step"] if progress else 0
    while True:
        assert train(runner, step, path).error is None
        step += 1
        reports.send(step)


def test_killed_at_any_moment_training_goes_on_from_a_state_that_was_at_most_one_step_before(model_dir, tmp_path):
    path, rng = tmp_path / "state.safetensors", random.Random(4)
    runner, course = make_runner(model_dir), make_runner(model_dir)
    expected, restored = [snapshot(course)], []
    fork = multiprocessing.get_context("fork")
    for _ in range(20):
        receiver, sender = fork.Pipe(duplex=False)
        child = fork.Process(target=train_until_killed, args=(runner, path, sender), daemon=True)
        child.start()
        sender.close()
        done = [receiver.recv() for _ in range(2)][-1]  # the first of the two is on disk, however slow that is
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child.pid, signal.SIGKILL)
        child.join(WAIT_S)
        while receiver.poll():
            try:
                done = receiver.recv()
            except EOFError:
                break
        progress = runner.shadow.load_training_state(str(path))
        number = progress["step"] if progress else 0
        while len(expected) <= number:
            train(course, len(expected) - 1)
            expected.append(snapshot(course))
        assert done - 1 <= number <= done + 1
        assert same(snapshot(runner), expected[number])
        restored.append(number)
    assert all(after > before for before, after in itertools.pairwise([0, *restored]))
