import hashlib
import itertools
import time
from contextlib import closing
from dataclasses import replace

import pytest

from alignment.drift import streams, tracker, window
from alignment.store.feedback_store import FeedbackStore
from alignment.store.pairs import PairStore
from core.config import AppArgs
from core.errors import ConflictError, StoreUnavailableError
from core.types import PairScore, TaskKind
from core.wire import BatchOutcome
from deployments.control.drift_monitor import DriftMonitor


class FakeQueue:
    """The methods of the CentralScheduler that the monitor calls."""

    def __init__(self):
        self.pairs = {}
        self.to_score = {}
        self.gamma = None

    def known_pair_ids(self):
        return {"train": list(self.pairs), "score": list(self.to_score)}

    def enqueue(self, pairs):
        self.pairs |= {pair.pair_id: pair for pair in pairs}

    def enqueue_scoring(self, pairs):
        self.to_score |= {pair.pair_id: pair for pair in pairs}

    def withdraw(self, pair_ids):
        return sum(self.pairs.pop(pair_id, None) is not None for pair_id in pair_ids)

    def clear(self):
        self.pairs, self.to_score = {}, {}

    def set_gamma(self, gamma):
        self.gamma = gamma

    def take_all(self):
        taken, self.pairs = list(self.pairs.values()), {}
        return taken


BARELY = "barely"
"""The adapter likes a pair, and there is something left to learn of it."""
ARGS = {
    "feedback": {"holdout_fraction": 0.0},
    "training": {"pairs_per_step": 2, "max_epochs": 3},
    "drift": {"window": 4, "quiet_rate": 0.5, "alarm_rate": 2.0},
}
task_ids = (f"task-{number}" for number in itertools.count())


def words(*seed):
    """A text of its own: pairs that are nearly the same would be weighted down."""
    digest = hashlib.sha256(repr(seed).encode()).hexdigest()
    return " ".join(digest[i : i + 4] for i in range(0, 40, 4))


class World:
    """A monitor with its queue, and an adapter that likes pairs or not."""

    def __init__(self, tmp_path, **changes):
        self.args = AppArgs.model_validate({**ARGS, "state_dir": str(tmp_path), **changes})
        self.queue = FakeQueue()
        self.monitor = DriftMonitor(self.args, self.queue)
        self.version = "base"

    def restart(self):
        self.queue = FakeQueue()
        self.monitor = DriftMonitor(self.args, self.queue)

    def post(self, *numbers, user=None):
        items = [
            {"prompt": words(n, "q"), "chosen": words(n, "good"), "rejected": words(n, "bad"), "user": user}
            for n in numbers
        ]
        return [outcome["pair_id"] for outcome in self.monitor.add_feedback(items)]

    def store(self):
        """The monitor's database, by a connection of its own."""
        return closing(FeedbackStore.open(self.args.feedback, self.args.state_dir))

    def newest_scored(self, limit):
        with self.store() as store:
            return store.sampling.newest_scored(limit)

    def stream(self):
        self.monitor.stream_once()

    def score(self, *, likes):
        """The live adapter scores what waits for it; returns the pairs."""
        scored, self.queue.to_score = list(self.queue.to_score.values()), {}
        if scored:
            self.monitor.record(self.outcome(scored, TaskKind.EVALUATE, likes=likes), [], self.version)
        return scored

    def train(self, *, likes=True):
        trained = self.queue.take_all()
        if trained:
            self.monitor.record(self.outcome(trained, TaskKind.TRAIN, likes=likes), [], self.version)
        return trained

    @staticmethod
    def outcome(pairs, kind, *, likes):
        loss, margin = (0.4, 0.7) if likes == BARELY else (0.1, 2.0) if likes else (1.5, -1.0)
        scores = tuple(PairScore(pair.pair_id, -1.0, -2.0, -3.0, -4.0, loss, margin) for pair in pairs)
        keys = {pair.pair_id: f"key-{pair.pair_id}" for pair in pairs}
        return BatchOutcome(next(task_ids), "e", scores, kind=kind, reference_keys=keys)

    def serve(self, fingerprint):
        self.version = "base"
        self.monitor.note_live("base", fingerprint)

    def publish(self, version):
        self.version = version
        self.monitor.note_live(version)


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    """Small constants make short streams."""
    monkeypatch.setattr(window, "MIN_PAIRS", 2)
    monkeypatch.setattr(tracker, "HALF_LIFE_PAIRS", 2)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_a_new_pair_is_scored_before_it_is_trained(world):
    ids = world.post(1, 2, 3)
    world.stream()
    assert set(world.queue.to_score) == set(ids)
    assert not world.queue.pairs
    world.stream()
    assert len(world.queue.to_score) == 3  # and not queued again
    world.score(likes=False)
    world.stream()
    assert set(world.queue.pairs) == set(ids)


def test_the_first_pair_of_all_is_trained_at_once(world):
    """Nothing is known yet, so it counts as an alarm."""
    world.post(1)
    assert trained_in_all(world, likes=BARELY) > 0


def test_a_new_pair_that_is_known_well_is_not_trained(world):
    world.post(1, 2, 3)
    assert trained_in_all(world, likes=True) == 0


def test_what_one_lesson_taught_is_not_trained_again(world):
    """With another version live, pairs are scored anew before they are trained, those in the queue too."""
    world.publish("v0001")
    ids = world.post(*range(12))
    for _ in range(2):
        world.stream()
        world.score(likes=False)
    world.stream()
    lesson = {pair.pair_id for pair in world.train(likes=False)}
    assert 0 < len(lesson) < len(ids)
    world.stream()
    assert world.queue.pairs
    world.publish("v0002")
    scored = set()
    for _ in range(6):
        world.stream()
        assert not world.queue.pairs
        scored |= {pair.pair_id for pair in world.score(likes=True)}
    assert scored == set(ids)


def test_what_a_lesson_did_not_teach_is_trained_after_it(world):
    world.publish("v0001")
    ids = world.post(*range(6))
    world.stream()
    world.score(likes=False)
    world.publish("v0002")
    for _ in range(3):
        world.stream()
        world.score(likes=BARELY)
    world.stream()
    assert set(world.queue.pairs) == set(ids)


def test_what_scoring_found_travels_with_the_pair(world):
    (pair_id,) = world.post(1)
    world.stream()
    world.score(likes=False)
    world.stream()
    (pair,) = world.queue.take_all()
    assert pair.dpo_loss == 1.5
    assert pair.role == "new"
    reference = pair.reference
    assert (reference.key, reference.chosen_logp, reference.rejected_logp) == (f"key-{pair_id}", -3.0, -4.0)


def test_only_so_many_are_queued_ahead(world):
    world.post(*range(30))
    world.stream()
    assert len(world.queue.to_score) == 8  # four batches of two
    world.score(likes=False)
    world.stream()
    assert len(world.queue.pairs) == 8


def trained_in_all(world, likes, learnt=None):
    """Train until the monitor wants no more; returns how many pair-slots that were.

    The live adapter `likes` pairs, and the one in training does so once they are `learnt`, by default the same.
    """
    total = idle = 0
    for _ in range(100):
        world.stream()
        scored = world.score(likes=likes)
        batch = world.train(likes=likes if learnt is None else learnt)
        total += len(batch)
        idle = 0 if scored or batch else idle + 1
        if idle == 2:
            return total
    raise AssertionError("training never ends")


def settle(world):
    """Pairs that the live adapter agrees with, until nothing alarms any more."""
    world.post(*range(1000, 1040))
    trained_in_all(world, likes=BARELY, learnt=True)


def test_a_quiet_stream_trains_a_share_of_its_pairs(world):
    settle(world)
    world.post(*range(20))
    assert (
        10 <= trained_in_all(world, likes=BARELY, learnt=True) <= 12
    )  # half of them, and a little credit from before


def test_an_alarm_trains_every_pair_as_often_as_allowed_while_the_window_complains(world):
    world.post(*range(4))
    assert trained_in_all(world, likes=False) == 4 * 3  # max_epochs
    drift = world.monitor.stats()["drift"]
    assert drift["drifted"]
    assert drift["retrain_rate"] == 2.0


def test_a_published_version_is_scored_on_the_newest_pairs_and_ends_the_alarm(world):
    world.publish("v0001")
    world.post(*range(6))
    world.stream()
    world.score(likes=False)
    assert world.monitor.drift()["drifted"]
    world.publish("v0002")
    world.stream()
    assert len(world.queue.to_score) == 6  # the window, and what only the version before got wrong
    world.score(likes=True)
    assert not world.monitor.drift()["drifted"]
    world.stream()
    assert not world.queue.to_score
    assert not world.queue.pairs


def test_gamma_follows_the_level(world):
    world.stream()
    assert world.queue.gamma == 2.0  # nothing is known yet
    settle(world)
    assert world.queue.gamma == pytest.approx(0.5, abs=0.01)
    world.post(1, 2, 3)
    world.stream()
    world.score(likes=False)
    world.stream()
    assert world.queue.gamma == 2.0


def test_the_baselines_train_at_a_fixed_rate_whatever_the_scores(tmp_path):
    for policy, likes in itertools.product(("periodic", "continuous"), (True, False)):
        world = World(tmp_path / f"{policy}{likes}", scheduler={"policy": policy})
        world.post(*range(4))
        assert trained_in_all(world, likes=likes) == 8
        assert world.queue.gamma == 1.0


def test_a_repeated_report_counts_once(world):
    world.post(1, 2)
    world.stream()
    world.score(likes=False)
    world.stream()
    outcome = world.outcome(world.queue.take_all(), TaskKind.TRAIN, likes=False)
    world.monitor.record(outcome, [], "base")
    world.monitor.record(outcome, [], "base")
    world.stream()
    assert {pair.times_trained for pair in world.queue.pairs.values()} == {1}
    assert {pair.role for pair in world.queue.pairs.values()} == {"hard"}


def roles_after_two_rounds(world):
    world.post(*range(8))
    trained_in_all(world, likes=BARELY, learnt=True)
    world.post(*range(100, 108))
    world.stream()
    world.score(likes=False)
    world.stream()
    return [pair.role for pair in world.queue.pairs.values()]


def test_replay_takes_its_share(world, monkeypatch):
    deaf = streams.Sensitivity(hddm_confidence=1e-9, adwin_delta=1e-9, page_hinkley_threshold=1e3)
    monkeypatch.setattr(streams, "SENSITIVITY", deaf)
    roles = roles_after_two_rounds(world)
    assert roles.count("replay") == 2
    assert roles.count("new") == 6


def test_what_users_wanted_before_a_change_is_not_replayed(world):
    assert roles_after_two_rounds(world) == ["new"] * 8
    assert world.monitor.drift()["last_change_seq"] == 8


def test_a_change_takes_older_pairs_from_the_queue_and_grants_slots_for_the_new_ones(tmp_path):
    world = World(tmp_path, training={"pairs_per_step": 2, "max_epochs": 9})
    settle(world)
    world.post(*range(8))
    world.stream()
    world.score(likes=BARELY)
    world.stream()
    assert world.queue.pairs
    new = world.post(*range(100, 108))
    world.stream()
    world.score(likes=False)
    credit = world.monitor.drift()["training_credit"]
    assert credit >= 128
    world.stream()
    assert world.queue.pairs
    assert set(world.queue.pairs) <= set(new)


def test_unusable_and_failed_pairs_are_parked_with_their_reason(world):
    first, second = world.post(1, 2)
    outcome = BatchOutcome("t", "e", error="DivergedError: nan", unusable=((first, "PairTooLongError: x"),))
    world.monitor.record(outcome, [second], None)
    world.stream()
    assert not world.queue.to_score
    assert world.monitor.stats()["store"]["pairs"]["parked"] == 2


def test_held_out_pairs_are_scored_and_never_trained(tmp_path):
    world = World(tmp_path, feedback={"holdout_fraction": 0.5})
    world.post(*range(20))
    seen = set()
    for _ in range(20):
        world.stream()
        world.score(likes=False)
        seen |= {pair.pair_id for pair in world.train(likes=False)}
    held_out = world.monitor.held_out_pairs()
    ids = {pair.pair_id for pair in held_out.recent}
    assert ids
    assert not ids & seen
    assert all(pair.reference is not None for pair in held_out.recent)


def test_a_restart_goes_on_with_the_alarm_and_what_was_scored(world):
    world.publish("v0001")
    world.post(*range(6))
    world.stream()
    world.score(likes=False)
    before = world.monitor.drift()
    world.restart()
    after = world.monitor.drift()
    for key in ("drifted", "level", "accuracy", "num_pairs", "live_version", "training_credit"):
        assert after[key] == before[key], key
    assert [event["detail"] for event in after["history"]] == [event["detail"] for event in before["history"]]
    world.stream()
    assert world.queue.pairs
    assert not world.queue.to_score


def test_a_hostile_copy_of_a_pair_is_weighted_down_with_a_reason(world):
    for user in ("ann", "bob", "cid"):
        world.monitor.add_feedback([{"prompt": "q", "chosen": "yes", "rejected": "no", "user": user}])
    world.monitor.add_feedback([{"prompt": "q", "chosen": "no", "rejected": "yes", "user": "eve"}])
    world.stream()
    world.score(likes=True)
    eve = next(pair for pair in world.newest_scored(10) if pair.user == "eve")
    assert eve.quality < 0.5
    assert eve.quality_reasons
    ann = next(pair for pair in world.newest_scored(10) if pair.user == "ann")
    assert ann.quality > eve.quality


def test_a_pair_that_cannot_be_scored_again_does_not_hold_the_window_up(world):
    world.publish("v0001")
    ids = world.post(*range(6))
    world.stream()
    world.score(likes=False)
    world.publish("v0002")
    with world.store() as store:
        store.pairs.park(ids[-1], "it does not fit any more")
    for _ in range(3):
        world.stream()
        assert ids[-1] not in world.queue.to_score
        world.score(likes=True)
    assert not world.queue.to_score
    assert world.monitor.drift()["num_pairs"] == 4  # an older one has taken its place


def test_who_speaks_now_is_heard_before_a_large_import(world):
    world.post(*range(300))
    world.stream()
    new = world.post(*range(1000, 1004))
    for _ in range(2):
        world.score(likes=True)
        world.stream()
    scored = {pair.pair_id for pair in world.newest_scored(100)}
    assert set(new) <= scored | set(world.queue.to_score)


def test_what_a_refused_candidate_had_learnt_is_learnt_again(world):
    """Its scores are not those of the live version, which still gets the pairs wrong."""
    world.post(*range(4))
    world.stream()
    world.score(likes=False)
    world.stream()
    assert world.train(likes=True)  # the shadow likes them now, and is then refused
    again = 0
    for _ in range(20):
        world.stream()
        world.score(likes=False)
        again += len(world.train(likes=True))
    assert again >= 4


def test_a_report_that_came_twice_is_judged_once_and_in_full(world, monkeypatch):
    copies = [{"prompt": "q", "chosen": "good", "rejected": "bad", "user": "ann"} for _ in range(4)]
    world.monitor.add_feedback(copies)
    world.stream()
    outcome = world.outcome(list(world.queue.to_score.values()), TaskKind.EVALUATE, likes=True)
    world.queue.to_score = {}
    with monkeypatch.context() as patch:
        patch.setattr(PairStore, "set_quality", _locked)
        with pytest.raises(StoreUnavailableError):
            world.monitor.record(outcome, [], "base")
    world.monitor.record(outcome, [], "base")
    assert min(pair.quality for pair in world.newest_scored(10)) < 0.5
    assert world.monitor.drift()["num_pairs"] > 0


def _locked(self, changes):
    raise StoreUnavailableError("locked")


ONE, OTHER = "1-2-3-4", "0-2-3-4"


def test_another_base_model_learns_every_pair_anew_and_the_first_one_goes_on(world):
    world.serve(ONE)
    ids = world.post(1, 2, 3, 4)
    world.stream()
    world.score(likes=False)
    world.stream()
    assert {pair.pair_id for pair in world.train(likes=True)} == set(ids)
    world.score(likes=True)
    before, level = world.monitor.stats(), world.monitor.drift()["level"]
    assert before["store"]["pairs"]["trained"] == 4
    world.stream()
    world.serve(OTHER)
    assert (world.queue.pairs, world.queue.to_score) == ({}, {})
    assert world.monitor.stats()["store"]["pairs"]["trained"] == 0
    world.stream()
    assert set(world.queue.to_score) == set(ids)
    world.score(likes=False)
    world.stream()
    assert {pair.times_trained for pair in world.queue.pairs.values()} == {0}
    assert {pair.pair_id for pair in world.train(likes=True)} == set(ids)
    world.restart()  # Control dies: what it knows is of the model that was served last
    world.serve(OTHER)
    assert world.monitor.stats()["store"]["pairs"]["trained"] == 4
    world.serve(ONE)
    assert world.monitor.stats()["store"] == before["store"]
    assert world.monitor.drift()["level"] == level


def test_what_an_executor_of_another_model_found_is_not_recorded(world):
    world.serve(ONE)
    world.post(1, 2)
    world.stream()
    outcome = world.outcome(list(world.queue.to_score.values()), TaskKind.EVALUATE, likes=True)
    world.monitor.record(replace(outcome, fingerprint=OTHER), [], "base")
    assert world.newest_scored(9) == []
    world.monitor.record(replace(outcome, fingerprint=ONE), [], "base")
    assert len(world.newest_scored(9)) == 2


def test_a_rebuild_without_a_user_takes_their_pairs_out_of_queue_training_and_tests(world):
    of_ann, of_bob = world.post(1, 2, user="ann"), world.post(3, 4, user="bob")
    with pytest.raises(ConflictError, match="nothing to learn from"):
        world.monitor.begin_rebuild("e", [])
    world.stream()
    world.score(likes=False)
    world.stream()
    assert set(world.queue.pairs) == {*of_ann, *of_bob}
    with pytest.raises(ConflictError, match="by the user 'anne'"):
        world.monitor.begin_rebuild("e", ["anne"])
    begun = world.monitor.begin_rebuild("e", ["ann"])
    assert (begun.without_users, begun.num_pairs, begun.until_seq) == (("ann",), 2, 4)
    assert set(world.queue.pairs) == set(of_bob)
    assert [pair.pair_id for _, pair in world.monitor.relearning_pairs(0, 4, 9)] == of_bob
    assert world.monitor.stats()["rebuild"]["state"] == "running"
    with pytest.raises(ConflictError, match="running on e"):
        world.monitor.begin_rebuild("f", [])
    world.train()
    world.train()
    world.monitor.note_rebuild({"state": "published", "until_seq": begun.until_seq, "executor_id": "e"})
    with world.store() as store:
        assert {pair.pair_id: pair.times_trained for pair in store.pairs.after(0, 9)} == dict.fromkeys(
            of_ann, 0
        ) | dict.fromkeys(of_bob, 1)
    assert world.monitor.begin_rebuild("f", []).num_pairs == 4


def test_new_feedback_is_queued_at_once_and_nothing_is_asked_without_any(world):
    """The queue counts the questions that the stream asks of it."""
    asked, known_pair_ids = [], world.queue.known_pair_ids

    def count():
        asked.append(time.monotonic())
        return known_pair_ids()

    world.queue.known_pair_ids = count
    world.monitor.start()
    deadline_s = time.monotonic() + 10
    while not asked and time.monotonic() < deadline_s:
        time.sleep(0.01)
    time.sleep(1.0)
    assert len(asked) == 1
    posted_s = time.monotonic()
    (pair_id,) = world.post(1)
    while pair_id not in world.queue.to_score and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert pair_id in world.queue.to_score
    assert asked[1] - posted_s < 1.0  # far below the time after which the stream looks by itself
