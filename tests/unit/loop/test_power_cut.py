"""The power fails at each write of a publication and of a checkpoint: what is found is whole or absent, what was
acknowledged is there, and training goes on from the last step."""

import dataclasses
import os
import time

import pytest
import torch

from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.registry import AdapterRegistry
from core.config import AppArgs
from core.types import Checkpoint
from deployments.learning.training_progress import claim_checkpoint
from engine.training.runner import FineTuneRunner
from tests.support.power_cut import Disk
from tests.support.trainable_models import make_task, make_training, save_model, snapshot

WAIT_S = 20.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)


@pytest.fixture
def runner(model_dir):
    return make_runner(model_dir)


def make_runner(model_dir):
    args = AppArgs(training=make_training(), lora={"rank": 4, "alpha": 8.0})
    device = torch.device("cpu")
    return FineTuneRunner(model_dir=model_dir, args=args, dtype=torch.float32, device=device, weights=None)


def train(runner, step, path=None):
    """Step number `step` (from 0) of a fixed course of training."""
    checkpoint = Checkpoint(str(path), {"step": step + 1}) if path else None
    runner.submit(dataclasses.replace(make_task(2, seed=step), checkpoint=checkpoint).to_wire())
    while not (finished := runner.run(0.0, 1).finished):
        time.sleep(1e-4)
    assert finished[0].error is None
    assert runner.shadow.checkpoints.wait(WAIT_S)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_state(runner, path, progress):
    while not runner.shadow.save_training_state(path, progress):
        time.sleep(1e-4)


def claim(directory):
    """The checkpoint file of an executor that has just started there."""
    path, descriptor = claim_checkpoint(directory / "state" / "training", "fingerprint")
    os.close(descriptor)
    return path


def publish(runner, disk, state, name):
    """What an executor does with a candidate that the gate lets through."""
    registry = AdapterRegistry.open(state / "adapters", "base")
    temporary = registry.begin()
    runner.shadow.save_adapter(temporary, "base")
    version = registry.commit(temporary, AdapterManifest(base_model="base"))
    assert version.name == name
    disk.promise("committed")
    assert registry.serving.activate(version.name, by="gate")
    disk.promise("live")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_version_is_whole_or_absent_and_what_was_live_stays(runner, tmp_path, is_first):
    state, names, expected = tmp_path / "disk" / "state", ["v0001"], {None: runner.shadow.read(None)}
    state.parent.mkdir()
    if not is_first:
        train(runner, 0)
        publish(runner, Disk(state), state, "v0001")
        names = ["v0001", "v0002"]
        expected = {"v0001": runner.shadow.read(state / "adapters" / "v0001")}
    train(runner, 1)
    disk = Disk(state.parent)
    with disk.watched():
        publish(runner, disk, state, names[-1])
    expected[names[-1]] = runner.shadow.read(state / "adapters" / names[-1])
    assert len(disk.found) > 30
    lives = set()
    for number, found in enumerate(disk.found):
        root = found.write(tmp_path / str(number)) / "state" / "adapters"
        for _ in range(2):  # a second start finds what the first one left
            registry = AdapterRegistry.open(root, "base")
            live = registry.recover_live()
            listed = [version.name for version in registry.list()]
            assert registry.damaged == {}, found.kind
            assert listed in (names[:-1], names), found.kind
            assert not list(root.glob(".tmp-*")), found.kind
        lives.add(live.name if live else None)
        assert torch.equal(runner.shadow.read(live.path if live else None), expected[live.name if live else None])
        if "committed" in found.promises:
            assert listed == names, found.kind
        if "live" in found.promises:
            assert live.name == names[-1], found.kind
            assert registry.serving.activations()[-1].by == "gate", found.kind
        temporary = registry.begin()
        runner.shadow.save_adapter(temporary, "base")
        assert registry.commit(temporary, AdapterManifest(base_model="base")).name not in listed
    assert lives == expected.keys()


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("writes", ["a step", "a publication"])
def test_training_goes_on_from_the_last_step(runner, model_dir, tmp_path, num_steps, writes):
    course = [snapshot(runner.shadow)]
    disk = Disk(tmp_path / "disk")
    disk.root.mkdir()

    for step in range(num_steps):
        train(runner, step, claim(disk.root))
        course.append(snapshot(runner.shadow))
    with disk.watched():
        path = claim(disk.root)
        train(runner, num_steps, path if writes == "a step" else None)
        if writes == "a publication":
            save_state(runner, path, {"step": num_steps + 1, "base": "v0001"})
        disk.promise("done")
    course.append(snapshot(runner.shadow))
    train(runner, num_steps + 1)
    course.append(snapshot(runner.shadow))

    other, counts = make_runner(model_dir), set()
    for number, found in enumerate(disk.found):
        directory = found.write(tmp_path / str(number))
        other.shadow.load_adapter(None)
        at = claim(directory)
        progress = other.shadow.load_training_state(at)
        count = progress["step"] if progress else 0
        assert count in ((num_steps + 1,) if "done" in found.promises else (num_steps, num_steps + 1)), found.kind
        assert same(snapshot(other.shadow), course[count]), found.kind
        assert not list(at.parent.glob("*.partial")), found.kind
        if count not in counts:
            for step in range(count, num_steps + 2):
                train(other, step)
            assert same(snapshot(other.shadow), course[-1])
        counts.add(count)
    assert counts == {num_steps, num_steps + 1}
