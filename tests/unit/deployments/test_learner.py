import asyncio

import pytest

from alignment.registry import AdapterRegistry
from core.config import AppArgs
from core.errors import PairTooLongError, StoreUnavailableError
from core.messages import TrainingBatch, TrainingPair
from core.types import TokenizedPair
from deployments import learner as learner_module
from deployments.learner import Learner
from deployments.versions import AdapterVersions
from tests.unit.deployments.fakes import FakeControl, FakeEngine

BASE_MODEL = "base-model"


class FakeTokenizer:
    def tokenize(self, pair):
        if pair.prompt == "long":
            raise PairTooLongError("too long")
        return TokenizedPair(pair.pair_id, (1,), (2,), (3,))


def batch(number, *prompts):
    pairs = tuple(
        TrainingPair(f"p{number}-{i}", prompt, "a", "b") for i, prompt in enumerate(prompts or ("q",) * 2)
    )
    return TrainingBatch(f"task-{number}", pairs)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(learner_module, "POLL_INTERVAL_S", 0.001)
    monkeypatch.setattr(learner_module, "_CONTROL_BACKOFF_S", 0.001)


class World:
    """A learner with its registry and names; `run` lets it work until it has nothing left to do."""

    def __init__(self, tmp_path, control, **training):
        self.control = control
        self.engine = FakeEngine()
        self.args = AppArgs.model_validate({"training": training, "state_dir": tmp_path})
        self.registry = AdapterRegistry.open(tmp_path / "adapters", BASE_MODEL)
        self.names = {}
        self.versions = None
        self.learner = None

    def run(self, turns=200):
        asyncio.run(self._run(turns))
        return self.learner.status

    async def _run(self, turns):
        self.versions = AdapterVersions(self.engine, self.registry, "m")
        await self.versions.attach(self.names)
        self.learner = Learner(
            executor_id="e",
            engine=self.engine,
            control=self.control,
            versions=self.versions,
            registry=self.registry,
            tokenizer=FakeTokenizer(),
            args=self.args,
            base_model=BASE_MODEL,
        )
        await self.learner.restore()
        task = asyncio.create_task(self.learner.run())
        await asyncio.sleep(0.001 * turns)
        task.cancel()


def test_a_candidate_is_published_when_the_queue_is_empty(tmp_path):
    world = World(tmp_path, FakeControl([batch(1), batch(2)], held_out=[TrainingPair("h", "q", "a", "b")]))
    status = world.run()
    assert status.steps == 2
    assert world.versions.live == "v0001"
    assert world.names["m"][0] == "m@v0001"
    manifest = world.registry.get("v0001").manifest
    assert (manifest.parent, manifest.optimizer_steps) == (None, 2)
    assert set(manifest.pair_ids) == {"p1-0", "p1-1", "p2-0", "p2-1"}
    assert ("save_training_state", "v0001.safetensors") in world.engine.calls


def test_a_candidate_is_offered_every_so_many_steps(tmp_path):
    world = World(tmp_path, FakeControl([batch(i) for i in range(4)]), steps_per_candidate=2)
    world.run()
    assert [version.name for version in world.registry.list()] == ["v0001", "v0002"]
    assert world.registry.get("v0002").manifest.parent == "v0001"


def test_a_worse_candidate_is_kept_but_not_published_and_training_returns_to_live(tmp_path):
    world = World(tmp_path, FakeControl([batch(1)], held_out=[TrainingPair("h", "q", "a", "b")]))
    world.engine.live_margin, world.engine.shadow_margin = 2.0, -1.0
    status = world.run()
    assert world.versions.live == "base"
    assert world.registry.get("v0001").manifest.status == "rejected"
    assert "fell" in status.last_decision
    assert world.engine.calls[-1] == ("load_adapter", None)


def test_a_failed_step_is_reported_and_the_next_one_runs(tmp_path):
    world = World(tmp_path, FakeControl([batch(1), batch(2)]))
    world.engine.error = "DivergedError: loss is nan"
    status = world.run()
    assert status.failed_steps == 2
    assert [outcome.error for outcome, _ in world.control.completed] == ["DivergedError: loss is nan"] * 2
    assert world.versions.live == "base"


def test_ten_failures_in_a_row_pause_training_with_the_reason(tmp_path):
    world = World(tmp_path, FakeControl([batch(i) for i in range(12)]))
    world.engine.error = "DivergedError: x"
    status = world.run()
    assert status.paused
    assert "10 failed steps in a row, the last: DivergedError: x" in status.pause_reason
    assert len(world.control.batches) == 2


def test_a_pair_that_does_not_fit_is_named_and_the_rest_is_trained(tmp_path):
    world = World(tmp_path, FakeControl([batch(1, "q", "long")]))
    world.run()
    assert world.engine.trained == [["p1-0"]]
    [(outcome, _)] = world.control.completed
    assert outcome.unusable == (("p1-1", "PairTooLongError: too long"),)


def test_a_finished_step_is_reported_until_control_is_back(tmp_path):
    control = FakeControl([batch(1)])
    world = World(tmp_path, control)
    poll = control.poll

    async def poll_then_die(headroom):
        given = await poll(headroom)
        control.down = 5 if given else control.down
        return given

    control.poll = poll_then_die
    status = world.run()
    assert len(control.completed) == 1
    assert status.steps == 1


def test_a_finished_step_is_reported_until_the_store_takes_it(tmp_path):
    control = FakeControl([batch(1)])
    complete, refusals = control.complete, [StoreUnavailableError("locked")] * 3

    async def refuse_at_first(outcome, version):
        if refusals:
            raise refusals.pop()
        await complete(outcome, version)

    control.complete = refuse_at_first
    world = World(tmp_path, control)
    world.run()
    assert world.engine.trained == [["p1-0", "p1-1"]]
    assert len(control.completed) == 1


def test_a_candidate_that_cannot_be_evaluated_is_rejected_once(tmp_path):
    world = World(tmp_path, FakeControl([batch(1)], held_out=[TrainingPair("h", "q", "a", "b")]))
    world.engine.evaluation_error = "DivergedError: nan"
    status = world.run()
    [version] = world.registry.list()
    assert version.manifest.status == "rejected"
    assert "could not be evaluated" in version.manifest.reason
    assert status.steps_since_candidate == 0


def test_after_a_restart_the_live_version_is_back(tmp_path):
    World(tmp_path, FakeControl([batch(1)])).run()
    again = World(tmp_path, FakeControl([]))
    again.run(20)
    assert again.versions.live == "v0001"
    assert again.names["m"][0] == "m@v0001"
    assert ("load_adapter", "v0001") in again.engine.calls
