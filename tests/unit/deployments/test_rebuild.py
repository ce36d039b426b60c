"""Learning anew from the base: every stored pair, behind the gate, while what is live stays live."""

import pytest

from core.errors import ConflictError
from core.types import PairScore, StepMetrics, TaskKind, TaskResult
from core.wire import Rebuild, TrainingPair
from deployments.learning import learner as learner_module
from deployments.learning.training_progress import TrainingProgress
from tests.support.fake_ports import FakeControl, FakeEngine
from tests.unit.deployments.test_learner import World, batch

HELD_OUT = [TrainingPair("h", "q", "a", "b")]


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(learner_module, "_WAIT_S", 0.001)
    monkeypatch.setattr(learner_module, "_CONTROL_BACKOFF_S", 0.001)
    monkeypatch.setattr(learner_module, "_FAILURE_BACKOFF_S", 0.001)


class SlowLearner(FakeEngine):
    """The loss of a pair falls below the bound with its second training; that of `stubborn` ones never does."""

    def __init__(self, stubborn=()):
        super().__init__()
        self.stubborn = stubborn
        self.times = {}

    async def run_task(self, task):
        result = await super().run_task(task)
        if task.kind is not TaskKind.TRAIN or result.error:
            return result
        scores = []
        for pair in task.pairs:
            times = self.times[pair.pair_id] = self.times.get(pair.pair_id, 0) + 1
            loss = 0.1 if times > 1 and pair.pair_id not in self.stubborn else 0.69
            scores.append(PairScore(pair.pair_id, 0.0, 0.0, 0.0, 0.0, loss, 1.0))
        return TaskResult(task.task_id, task.kind, StepMetrics(0.5, 1.0, 1.0), tuple(scores))


def stored(count, start=1):
    return [(seq, TrainingPair(f"s{seq}", "q", "a", "b")) for seq in range(start, start + count)]


@pytest.fixture
def world(tmp_path):
    """A server whose live version is v0001, with five pairs stored."""
    world = World(tmp_path, FakeControl([batch(1)], held_out=HELD_OUT), pairs_per_step=2, max_epochs=4)
    world.run()
    assert world.versions.live == "v0001"
    world.engine = SlowLearner()
    world.control.stored = stored(5)
    return world


async def ask(world, **rebuild):
    """What the route does, as soon as the learner runs."""
    world.learner.check_rebuild()
    world.learner.begin_rebuild(Rebuild(num_pairs=5, until_seq=5, **rebuild))


def rebuild(world, monkeypatch, **options):
    restore = learner_module.Learner.restore

    async def restore_and_ask(learner):
        await restore(learner)
        await ask(world, **options)

    monkeypatch.setattr(learner_module.Learner, "restore", restore_and_ask)
    ended = lambda: any(report["state"] != "running" for report in world.control.reports)  # noqa: E731
    world.run(until=ended)
    monkeypatch.undo()
    return world.control.reports[-1]


def test_every_pair_is_learnt_from_the_base_in_order_and_the_candidate_goes_live(world, monkeypatch):
    report = rebuild(world, monkeypatch)
    assert (report["state"], report["version"], report["until_seq"]) == ("published", "v0002", 5)
    assert world.engine.trained == [["s1", "s2"], ["s3", "s4"], ["s5"], ["s1", "s2"], ["s3", "s4"], ["s5"]]
    assert world.versions.live == "v0002"
    manifest = world.registry.get("v0002").manifest
    assert (manifest.parent, manifest.optimizer_steps) == (None, 6)
    assert manifest.pair_ids == ("s1", "s2", "s3", "s4", "s5")
    assert manifest.config["compared_with"] == "v0001"
    assert manifest.config["rebuild"]["num_pairs"] == 5
    assert world.learner.shadow.progress.rebuild is None
    assert ("load_adapter", None) in world.engine.calls
    assert [report["num_taken"] for report in world.control.reports[:3]] == [2, 4, 5]


def test_a_worse_one_is_refused_and_training_returns_to_what_is_live(world, monkeypatch):
    world.engine.live_margin, world.engine.shadow_margin = 2.0, -1.0
    report = rebuild(world, monkeypatch)
    assert (report["state"], report["version"]) == ("refused", "v0002")
    assert "fell" in report["reason"]
    assert world.versions.live == "v0001"
    assert world.engine.saved[world.checkpoint]["base"] == "v0001"
    assert world.engine.calls[-2][0] == "load_adapter"


def test_later_passes_take_what_is_hard_behind_the_last_change_and_end(world, monkeypatch):
    world.engine.stubborn = ("s1", "s4")
    rebuild(world, monkeypatch, since_seq=2)
    first, *later = [["s1", "s2"], ["s3", "s4"], ["s5"]], ["s3", "s4"], ["s5"], ["s4"], ["s4"]
    assert world.engine.trained == [*first, *later]  # four passes, as `max_epochs` says


def test_a_failing_batch_is_left_out_after_three_attempts(world, monkeypatch):
    run_task = world.engine.run_task

    async def fail_with_s3(task):
        if task.kind is TaskKind.TRAIN and task.pairs[0].pair_id == "s3":
            world.engine.trained.append("failed")
            return TaskResult(task.task_id, task.kind, error="DivergedError: nan")
        return await run_task(task)

    world.engine.run_task = fail_with_s3
    assert rebuild(world, monkeypatch)["state"] == "published"
    assert world.engine.trained[:5] == [["s1", "s2"], "failed", "failed", "failed", ["s5"]]


def test_a_pair_that_cannot_be_tokenized_is_parked_and_the_rest_goes_on(world, monkeypatch):
    world.control.stored[1] = (2, TrainingPair("s2", "long", "a", "b"))
    assert rebuild(world, monkeypatch)["state"] == "published"
    assert world.engine.trained[0] == ["s1"]
    parked = {pair_id for outcome, _ in world.control.completed for pair_id, _ in outcome.unusable}
    assert parked == {"s2"}


def test_new_pairs_are_scored_meanwhile_and_no_other_training_runs(world, monkeypatch):
    before = len(world.control.headrooms)
    rebuild(world, monkeypatch)
    assert [room.refusal for room in world.control.headrooms[before:]][:7] == ["it learns anew"] * 7


def test_a_restart_goes_on_from_the_last_step_though_another_version_went_live(world, monkeypatch):
    progress = TrainingProgress(
        "base", "v0001", total_steps=9, rebuild=Rebuild((), 5, until_seq=5, after_seq=2, num_taken=2)
    )
    world.engine.saved[world.checkpoint] = progress.to_wire()
    world.control.stored = stored(5)
    world.registry.serving.activate(None)
    world.run(until=lambda: any(report["state"] != "running" for report in world.control.reports))
    assert world.engine.trained[:2] == [["s3", "s4"], ["s5"]]
    assert world.control.reports[-1]["state"] == "published"
    assert world.registry.get("v0002").manifest.config["compared_with"] == "base"


def test_a_restart_just_after_the_publication_still_tells_how_it_ended(world, monkeypatch):
    saved = []
    save = world.engine.save_training_state

    async def save_and_remember(path, progress):
        saved.append(dict(world.engine.saved))
        await save(path, progress)

    world.engine.save_training_state = save_and_remember
    assert rebuild(world, monkeypatch)["version"] == "v0002"
    world.engine.saved = saved[-1]  # killed before this was written
    world.control.reports.clear()
    world.run(until=lambda: world.control.reports)
    report = world.control.reports[0]
    assert (report["state"], report["version"], report["until_seq"]) == ("published", "v0002", 5)
    assert world.learner.shadow.progress.rebuild is None
    assert world.versions.live == "v0002"


def test_control_may_be_away_meanwhile(world, monkeypatch):
    world.control.down = 5
    assert rebuild(world, monkeypatch)["state"] == "published"


def test_one_at_a_time_and_none_while_a_version_is_pinned(world):
    world.run(turns=20)
    world.learner.rebuilder.asked = Rebuild()
    with pytest.raises(ConflictError, match="running"):
        world.learner.check_rebuild()
    world.learner.rebuilder.asked = None
    world.registry.serving.activate("v0001", pin=True)
    world.run(turns=20)
    with pytest.raises(ConflictError, match="v0001 is pinned"):
        world.learner.check_rebuild()
