import asyncio
import contextlib

import pytest

from alignment.versions.registry import AdapterRegistry
from core.config import AppArgs, TrainingConfig
from core.errors import AdapterError, EngineUnavailableError, PairTooLongError, StoreUnavailableError
from core.types import TaskKind, TokenizedPair
from core.wire import CachedReference, Rebuild, TrainingBatch, TrainingPair
from deployments.learning import learner as learner_module
from deployments.learning.learner import Learner
from deployments.publishing.versions import AdapterVersions
from engine.training.pair_tokens import PairTokenizer
from tests.support.fake_ports import FakeControl, FakeEngine

BASE_MODEL = "base-model"


class FakeTokenizer(PairTokenizer):
    def __init__(self):
        super().__init__(None, set(), TrainingConfig(), BASE_MODEL)

    def token_ids(self, pair):
        if pair.prompt == "long":
            raise PairTooLongError("too long")
        return (1,), (2,), (3,)


def batch(number, *prompts):
    pairs = tuple(
        TrainingPair(f"p{number}-{i}", prompt, "a", "b") for i, prompt in enumerate(prompts or ("q",) * 2)
    )
    return TrainingBatch(f"task-{number}", pairs)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(learner_module, "_WAIT_S", 0.001)
    monkeypatch.setattr(learner_module, "_CONTROL_BACKOFF_S", 0.001)
    monkeypatch.setattr(learner_module, "_FAILURE_BACKOFF_S", 0.001)


class World:
    """A learner with its registry and names; `run` lets it work until it has nothing left to do."""

    def __init__(self, tmp_path, control, **training):
        self.control = control
        self.engine = FakeEngine()
        self.args = AppArgs.model_validate({"training": training, "state_dir": tmp_path})
        self.checkpoint = tmp_path / "training" / "checkpoint.safetensors"
        self.registry = AdapterRegistry.open(tmp_path / "adapters", BASE_MODEL)
        self.names = {}
        self.versions = None
        self.learner = None

    def run(self, turns=None, until=None):
        """So many turns, or until that is true, or else until nothing is left to do."""
        asyncio.run(self.work(turns, until or self._is_idle))
        return self.learner.status

    def _is_idle(self):
        status = self.learner.status_to_wire()
        is_resting = status["phase"] in ("idle", "paused", "pinned") and not status["steps_since_candidate"]
        return is_resting and (status["paused"] or not self.control.batches)

    async def work(self, turns, until=None, during=None):
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
            checkpoint=self.checkpoint,
        )
        await self.learner.restore()
        task = asyncio.create_task(self.learner.run())
        if during is not None:
            await during()
        elif turns is not None:
            await asyncio.sleep(0.001 * turns)
        else:
            async with asyncio.timeout(10):
                await asyncio.sleep(0.02)
                while not until():  # noqa: ASYNC110 - the learner has no event for it
                    await asyncio.sleep(0.001)
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
    saved = world.engine.saved[world.checkpoint]
    assert (saved["base"], saved["total_steps"], saved["steps_since_candidate"]) == ("v0001", 2, 0)


def test_a_candidate_is_offered_every_so_many_steps(tmp_path):
    world = World(tmp_path, FakeControl([batch(i) for i in range(4)]), steps_per_candidate=2)
    world.run()
    assert [version.name for version in world.registry.list()] == ["v0001", "v0002"]
    assert world.registry.get("v0002").manifest.parent == "v0001"


def test_a_candidate_is_offered_early_where_little_is_left_to_learn(tmp_path):
    world = World(tmp_path, FakeControl([batch(i) for i in range(8)]), steps_per_candidate=8)
    world.engine.train_loss = 0.02
    world.run()
    steps = [version.manifest.optimizer_steps for version in world.registry.list()]
    assert steps == [4, 4]


def test_a_worse_candidate_is_kept_but_not_published_and_training_returns_to_live(tmp_path):
    world = World(tmp_path, FakeControl([batch(1)], held_out=[TrainingPair("h", "q", "a", "b")]))
    world.engine.live_margin, world.engine.shadow_margin = 2.0, -1.0
    status = world.run()
    assert world.versions.live == "base"
    assert world.registry.get("v0001").manifest.status == "rejected"
    assert "fell" in status.last_decision
    assert ("load_adapter", None) in world.engine.calls
    assert world.engine.saved[world.checkpoint]["base"] == "base"


def test_after_four_refusals_in_a_row_training_goes_on_from_the_parent(tmp_path):
    control = FakeControl([batch(i) for i in range(2)], held_out=[TrainingPair("h", "q", "a", "b")])
    world = World(tmp_path, control, steps_per_candidate=1)
    world.run()
    assert world.versions.live == "v0002"
    world.engine.live_margin, world.engine.shadow_margin = 2.0, -1.0
    control.batches = [batch(i) for i in range(10, 19)]
    world.engine.calls.clear()
    world.run()
    loaded = [what for call, what in world.engine.calls if call == "load_adapter"]
    assert loaded[-9:] == ["v0002"] * 3 + ["v0001"] * 4 + [None] * 2
    assert [version.manifest.parent for version in world.registry.list()[-4:]] == ["v0001"] * 3 + [None]
    world.run(turns=20)  # a restart goes on from there
    assert world.learner.shadow.progress.base == "base"
    control.batches = [batch(20), batch(21)]
    world.engine.shadow_margin = 3.0
    world.run()
    assert world.versions.live == "v0013"
    assert world.registry.get("v0012").manifest.parent is None
    assert world.registry.get("v0013").manifest.parent == "v0012"


def test_a_failed_step_is_reported_and_the_next_one_runs(tmp_path):
    world = World(tmp_path, FakeControl([batch(1), batch(2)]))
    world.engine.error = "DivergedError: loss is nan"
    status = world.run()
    assert status.failed_steps == 2
    assert [outcome.error for outcome, _ in world.control.completed] == ["DivergedError: loss is nan"] * 2
    assert world.versions.live == "base"


def test_ten_failures_in_a_row_pause_training_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(learner_module, "_FAILURE_BACKOFF_S", 0.0)
    world = World(tmp_path, FakeControl([batch(i) for i in range(12)]))
    world.engine.error = "DivergedError: x"
    status = world.run()
    assert status.paused
    assert "10 failed tasks in a row, the last: DivergedError: x" in status.pause_reason
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
    world.run()
    [version] = world.registry.list()
    assert version.manifest.status == "rejected"
    assert "could not be evaluated" in version.manifest.reason
    assert world.learner.status_to_wire()["steps_since_candidate"] == 0


def test_after_a_restart_the_live_version_is_back(tmp_path):
    World(tmp_path, FakeControl([batch(1)])).run()
    again = World(tmp_path, FakeControl([]))
    again.run()
    assert again.versions.live == "v0001"
    assert again.names["m"][0] == "m@v0001"
    assert ("load_adapter", "v0001") in again.engine.calls


def to_score(*prompts):
    pairs = tuple(TrainingPair(f"s{i}", prompt, "a", "b") for i, prompt in enumerate(prompts))
    return TrainingBatch("score-1", pairs, kind=TaskKind.EVALUATE)


def test_a_batch_to_score_is_scored_by_the_live_adapter_and_changes_nothing(tmp_path):
    world = World(tmp_path, FakeControl([to_score("q", "long")]))
    world.engine.live_margin = -3.0
    world.run()
    (task,) = world.engine.tasks
    assert (task.kind, task.on_live, task.checkpoint) == (TaskKind.EVALUATE, True, None)
    ((outcome, version),) = world.control.completed
    assert (outcome.kind, version) == (TaskKind.EVALUATE, "base")
    assert [score.margin for score in outcome.scores] == [-3.0]
    assert set(outcome.reference_keys) == {"s0"}
    assert [pair_id for pair_id, _ in outcome.unusable] == ["s1"]
    assert world.registry.list() == ()


def test_a_cached_reference_is_used_for_the_same_tokens_and_no_others(tmp_path):
    pair = TokenizedPair("p", (1,), (2,), (3,))
    good = CachedReference(FakeTokenizer().reference_key(pair), -5.0, -6.0)
    stale = CachedReference("of other tokens", -7.0, -8.0)
    pairs = (TrainingPair("p", "q", "a", "b", reference=good), TrainingPair("o", "q", "a", "b", reference=stale))
    world = World(tmp_path, FakeControl([TrainingBatch("t", pairs)]))
    world.run()
    by_id = {
        pair.pair_id: pair for task in world.engine.tasks if task.kind is TaskKind.TRAIN for pair in task.pairs
    }
    assert by_id["p"].reference == (-5.0, -6.0)
    assert by_id["o"].reference is None


def test_weight_and_gamma_reach_the_engine(tmp_path):
    pairs = (TrainingPair("p", "q", "a", "b", weight=0.25),)
    world = World(tmp_path, FakeControl([TrainingBatch("t", pairs, gamma=2.0)]))
    world.run()
    task = world.engine.tasks[0]
    assert (task.pairs[0].weight, task.gamma) == (0.25, 2.0)


def restarted(tmp_path, before, **changes):
    """Another process on the same directory and checkpoint files."""
    world = World(tmp_path, FakeControl([]), **changes)
    world.engine.saved = before.engine.saved
    return world


def test_after_a_kill_training_goes_on_from_the_last_step(tmp_path):
    first = World(tmp_path, FakeControl([batch(1), batch(2)]), steps_per_candidate=8)
    first.run(until=lambda: len(first.control.completed) == 2)  # killed before a candidate is offered
    again = restarted(tmp_path, first)
    again.run(until=lambda: again.versions.live != "base")
    assert again.learner.status.restored_steps == 2
    assert ("load_adapter", None) not in again.engine.calls
    manifest = again.registry.get(again.versions.live).manifest
    assert manifest.optimizer_steps == 2
    assert set(manifest.pair_ids) == {"p1-0", "p1-1", "p2-0", "p2-1"}


def test_a_kill_between_publication_and_its_note_keeps_the_optimizer(tmp_path):
    first = World(tmp_path, FakeControl([batch(1)]))
    saved_after_step = {}
    publish = AdapterVersions.publish

    async def publish_then_die(self, version):
        saved_after_step.update(first.engine.saved)
        return await publish(self, version)

    first.engine.saved_after_step = saved_after_step
    AdapterVersions.publish = publish_then_die
    try:
        first.run()
    finally:
        AdapterVersions.publish = publish
    first.engine.saved = saved_after_step
    again = restarted(tmp_path, first)
    again.run(turns=2)
    assert again.versions.live == "v0001"
    assert ("load_adapter", "v0001") not in again.engine.calls
    assert again.learner.status_to_wire()["total_steps"] == 1
    assert again.learner.status_to_wire()["steps_since_candidate"] == 0


def test_a_checkpoint_of_another_version_is_not_gone_on_from(tmp_path):
    first = World(tmp_path, FakeControl([batch(1)]))
    first.run()
    again = restarted(tmp_path, first)
    again.engine.saved = {again.checkpoint: {"base": "v0099", "total_steps": 7, "steps_since_candidate": 3}}
    again.run(turns=2)
    assert ("load_adapter", "v0001") in again.engine.calls
    assert again.learner.status_to_wire()["steps_since_candidate"] == 0
    assert again.learner.status_to_wire()["total_steps"] == 7  # never goes back


@pytest.mark.parametrize(("of_checkpoint", "is_taken"), [("1-2-3-4", True), ("", True), ("0-2-3-4", False)])
def test_a_checkpoint_of_another_base_model_is_not_gone_on_from(tmp_path, of_checkpoint, is_taken):
    world = World(tmp_path, FakeControl([]))
    world.registry = AdapterRegistry.open(tmp_path / "adapters", BASE_MODEL, "1-2-3-4")
    saved = {"base": "base", "total_steps": 7, "steps_since_candidate": 3, "fingerprint": of_checkpoint}
    world.engine.saved = {world.checkpoint: saved}
    world.run(turns=1)
    assert (("load_adapter", None) in world.engine.calls) is not is_taken
    progress = world.learner.shadow.progress
    assert (progress.total_steps, progress.fingerprint) == (7 if is_taken else 0, "1-2-3-4")


@pytest.mark.parametrize("saved", [{}, {"total_steps": "many"}, {"base": None}])
def test_an_odd_checkpoint_is_ignored(tmp_path, saved):
    world = World(tmp_path, FakeControl([batch(1)]))
    world.engine.saved = {world.checkpoint: saved}
    world.run()
    assert world.versions.live == "v0001"


def test_a_candidate_that_repeats_itself_is_rejected_though_its_scores_are_fine(tmp_path):
    world = World(tmp_path, FakeControl([batch(1)], held_out=[TrainingPair("h", "q", "a", "b")]))
    world.engine.answers = lambda handle: range(60) if handle is None else [7, 8] * 30
    world.run()
    manifest = world.registry.get("v0001").manifest
    assert manifest.status == "rejected"
    assert "repetitions" in manifest.reason
    assert world.versions.live == "base"


def test_the_candidate_speaks_under_a_name_of_its_own_and_is_forgotten(tmp_path):
    world = World(tmp_path, FakeControl([batch(1)], held_out=[TrainingPair("h", "q", "a", "b")]))
    world.run()
    names = [name for call, name in world.engine.calls if call == "generate"]
    assert names[0].startswith("candidate-")
    assert names[1] is None  # the live one was the bare base model
    assert ("unload_version", names[0]) in world.engine.calls
    manifest = world.registry.get("v0001").manifest
    assert manifest.metrics["generation_length"] == 8.0


def test_failures_in_a_row_rest_longer_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(learner_module, "_FAILURE_BACKOFF_S", 0.02)
    world = World(tmp_path, FakeControl([batch(i) for i in range(12)]))
    world.engine.error = "DivergedError: x"
    status = world.run(turns=400)
    assert 1 < status.failed_steps < 7  # 0.02 + 0.04 + 0.08 + 0.16 + 0.32 s
    assert status.phase == "backing off"
    assert not status.paused


def test_the_monitor_is_told_what_is_live_at_the_start_and_after_each_change(tmp_path):
    world = World(tmp_path, FakeControl([batch(1)]))
    world.run(until=lambda: len(world.control.live) == 2)
    assert world.control.live == ["base", "v0001"]


def test_while_a_version_is_pinned_nothing_is_trained(tmp_path):
    World(tmp_path, FakeControl([batch(1)])).run()
    world = World(tmp_path, FakeControl([]))

    async def pinned():
        await world.work(5)
        await world.versions.activate("base")
        task = asyncio.create_task(world.learner.run())
        await asyncio.sleep(0.05)
        task.cancel()

    asyncio.run(pinned())
    assert world.control.headrooms[0].refusal == ""
    assert world.control.headrooms[-1].refusal == "base is pinned"
    assert world.learner.status.phase == "pinned"


def test_a_version_that_cannot_be_published_is_committed_once(tmp_path, monkeypatch):
    world = World(tmp_path, FakeControl([batch(1)]))

    async def refuse(self, version):
        raise AdapterError("the engine does not take it")

    monkeypatch.setattr(AdapterVersions, "publish", refuse)
    world.run(until=lambda: world.learner.status.last_error and len(world.control.headrooms) > 50)
    assert [version.name for version in world.registry.list()] == ["v0001"]


def test_a_failed_return_to_the_live_version_is_tried_again(tmp_path):
    World(tmp_path, FakeControl([batch(1)])).run()
    world = World(tmp_path, FakeControl([]))
    load, failures = world.engine.load_adapter, [OSError("disk full")] * 3

    async def fail_at_first(directory):
        if failures:
            raise failures.pop()
        await load(directory)

    async def roll_back():
        await world.work(turns=5)
        world.engine.load_adapter = fail_at_first
        await world.versions.activate("base")
        task = asyncio.create_task(world.learner.run())
        async with asyncio.timeout(10):
            while ("load_adapter", None) not in world.engine.calls:  # noqa: ASYNC110 - no event for it
                await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(roll_back())
    assert not failures


def test_scores_are_dropped_if_another_version_went_live_meanwhile(tmp_path):
    World(tmp_path, FakeControl([batch(1)])).run()
    world = World(tmp_path, FakeControl([to_score("q")]))
    run_task = world.engine.run_task

    async def activate_meanwhile(task):
        await world.versions.activate("base")
        return await run_task(task)

    world.engine.run_task = activate_meanwhile
    world.run(until=lambda: world.control.completed)
    ((outcome, _),) = world.control.completed
    assert outcome.scores == ()
    assert outcome.error is None


class MortalEngine(FakeEngine):
    """Dies under the first task that trains; what the shadow adapter was is gone until it is restored."""

    def __init__(self, died):
        super().__init__()
        self.died = died
        self.is_restored = True

    async def load_training_state(self, path):
        self.is_restored = True
        return await super().load_training_state(path)

    async def run_task(self, task):
        if self.died == "not yet" and task.kind is TaskKind.TRAIN:
            self.died, self.is_away, self.is_restored = "now", True, False
            raise EngineUnavailableError("the engine died")
        assert not self.is_away
        assert self.is_restored
        return await super().run_task(task)

    async def save_adapter(self, directory, base_model):
        if self.died == "before a candidate":
            self.died, self.is_away, self.is_restored = "now", True, False
            raise EngineUnavailableError("the engine died")
        assert self.is_restored
        await super().save_adapter(directory, base_model)


@pytest.mark.parametrize("died", ["not yet", "before a candidate"])
def test_training_waits_for_an_engine_that_died_and_goes_on_from_the_checkpoint(tmp_path, died):
    world = World(tmp_path, FakeControl([batch(1)], held_out=[TrainingPair("h", "q", "a", "b")]))
    world.engine = engine = MortalEngine(died)

    def comes_back():
        if engine.is_away and world.learner.status.phase == learner_module.WAITING_PHASE:
            polls = len(world.control.headrooms)
            world.control.batches.insert(0, batch(2))
            engine.is_away, engine.generation = False, 1
            assert polls == len(world.control.headrooms)
        return engine.generation == 1 and world.versions.live == "v0001"

    status = world.run(until=comes_back)
    errors = [outcome.error for outcome, _ in world.control.completed]
    if died == "not yet":
        assert errors == [
            "EngineUnavailableError: the engine died",
            None,
        ]  # a result: Control queues the batch again
        assert (status.failed_steps, status.steps) == (1, 1)
    else:
        assert errors == [None, None]
        assert status.steps == 2
    assert [version.name for version in world.registry.list()] == ["v0001"]
    assert engine.calls.count(("load_training_state", "checkpoint.safetensors")) == 2


class PatientControl(FakeControl):
    """A Control whose waits last as long as they may; `work` ends them."""

    def __init__(self):
        super().__init__([])
        self.work = asyncio.Event()
        self.waits = []

    async def wait_for_work(self, headroom, limit_s):
        self.waits.append(limit_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.work.wait(), limit_s)
        return self.work.is_set()


@pytest.mark.parametrize(
    ("happens", "phase"),
    [
        (lambda world: world.learner.pause(), "paused"),
        (lambda world: world.learner.follow_live(), "idle"),
        (lambda world: world.learner.begin_rebuild(Rebuild(num_pairs=1, until_seq=1)), "idle"),
        (lambda world: world.registry.serving.activate("v0001", pin=True), "pinned"),
    ],
)
def test_a_wait_for_work_ends_when_something_happens_here(tmp_path, monkeypatch, happens, phase):
    world = World(tmp_path, FakeControl([batch(1)], held_out=[TrainingPair("h", "q", "a", "b")]))
    world.run()
    world.control = control = PatientControl()
    monkeypatch.setattr(learner_module, "_WAIT_S", 60.0)

    async def watch():
        async with asyncio.timeout(10):
            while not control.waits:  # noqa: ASYNC110 - the learner has no event for it
                await asyncio.sleep(0.001)
            num_waits = len(control.waits)
            happens(world)
            await world.versions.refresh()
            while (  # noqa: ASYNC110
                world.learner.status.phase != phase or (phase == "idle" and len(control.waits) == num_waits)
            ):
                await asyncio.sleep(0.001)

    asyncio.run(world.work(turns=0, during=watch))


def test_new_work_is_taken_at_once(tmp_path, monkeypatch):
    control = PatientControl()
    world = World(tmp_path, control)
    monkeypatch.setattr(learner_module, "_WAIT_S", 60.0)

    async def watch():
        async with asyncio.timeout(10):
            await asyncio.sleep(0.05)
            control.batches.append(batch(1))
            control.work.set()
            while not world.learner.status.steps:  # noqa: ASYNC110 - the learner has no event for it
                await asyncio.sleep(0.001)

    asyncio.run(world.work(turns=0, during=watch))
    assert control.waits[0] == 60.0
    assert world.learner.status.steps == 1


def test_a_resumed_learner_does_not_wait_any_longer(tmp_path, monkeypatch):
    world = World(tmp_path, FakeControl([batch(1)]))
    monkeypatch.setattr(learner_module, "_WAIT_S", 60.0)

    async def watch():
        async with asyncio.timeout(10):
            world.learner.pause()
            while world.learner.status.phase != "paused":  # noqa: ASYNC110 - the learner has no event for it
                await asyncio.sleep(0.001)
            world.learner.resume()
            while not world.engine.trained:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    asyncio.run(world.work(turns=0, during=watch))


def test_a_batch_for_which_no_memory_was_left_goes_back_without_a_failure(tmp_path):
    """Its pairs are not to blame: three such reports would park them for good. The next poll gives the batch back."""
    world = World(tmp_path, FakeControl([batch(1)]))
    world.engine.error, world.engine.free_bytes = "DeviceMemoryError: no memory is left for training", 0
    status = world.run()
    assert world.engine.trained == [["p1-0", "p1-1"]]
    assert world.control.completed == []
    assert (status.failed_steps, status.paused) == (0, False)
    assert status.last_error == "DeviceMemoryError: no memory is left for training"
    assert len(world.control.headrooms) > 1


def test_a_learner_that_asks_for_no_work_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(learner_module, "_FAILURE_BACKOFF_S", 60.0)
    world = World(tmp_path, FakeControl([batch(1)]))
    world.run()
    assert world.learner.silence() == ""
    world.learner.pause()
    assert world.learner.silence() == "training is paused: asked for"

    async def fail():
        world.engine.error = "DivergedError: loss is nan"
        world.control.batches.append(batch(2))
        await asyncio.sleep(0.05)

    asyncio.run(world.work(0, during=fail))
    assert world.learner.silence() == "it rests after a failed task: DivergedError: loss is nan"
    world.engine.is_away = True
    asyncio.run(world.learner.turn())
    assert world.learner.silence() == "waiting for the engine"
