import itertools

import pytest

from core.messages import BatchOutcome
from core.types import PairScore
from deployments.drift_monitor import DriftMonitor


class FakeQueue:
    """Implements `deployments.drift_monitor.FineTuneQueue`."""

    def __init__(self):
        self.pairs = {}

    def known_pair_ids(self):
        return list(self.pairs)

    def enqueue(self, pairs):
        self.pairs |= {pair.pair_id: pair for pair in pairs}

    def take_all(self):
        taken, self.pairs = list(self.pairs.values()), {}
        return taken


@pytest.fixture
def queue():
    return FakeQueue()


@pytest.fixture
def monitor(tmp_path, queue):
    args = {
        "state_dir": str(tmp_path),
        "feedback": {"holdout_fraction": 0.0},
        "training": {"pairs_per_step": 2, "max_epochs": 3},
        "drift": {"window": 4, "min_pairs": 2},
    }
    return DriftMonitor(args, queue)


def post(monitor, *numbers, prompt="q"):
    items = [{"prompt": f"{prompt} {n}", "chosen": f"good {n}", "rejected": "bad"} for n in numbers]
    return [outcome["pair_id"] for outcome in monitor.add_feedback(items)]


task_ids = (f"task-{number}" for number in itertools.count())


def trained(monitor, pairs, loss, margin):
    scores = tuple(PairScore(pair.pair_id, 0, 0, 0, 0, loss, margin) for pair in pairs)
    outcome = BatchOutcome(next(task_ids), "e", scores)
    monitor.record(outcome, [], "v0001")
    return outcome


def test_a_repeated_report_counts_once(monitor, queue):
    post(monitor, 1, 2)
    monitor.stream_once()
    outcome = trained(monitor, queue.take_all(), loss=0.7, margin=-0.1)
    monitor.record(outcome, [], "v0001")
    monitor.stream_once()
    assert {pair.times_trained for pair in queue.pairs.values()} == {1}


def test_new_pairs_are_streamed_once_and_not_while_they_are_known(monitor, queue):
    ids = post(monitor, 1, 2, 3)
    assert monitor.stream_once() == 3
    assert monitor.stream_once() == 0
    assert set(queue.pairs) == set(ids)


def test_only_so_many_are_queued_ahead(monitor, queue):
    post(monitor, *range(30))
    monitor.stream_once()
    assert len(queue.pairs) == 8  # four batches of two


def test_pairs_come_again_while_the_window_complains_and_not_after(monitor, queue):
    post(monitor, 1, 2)
    monitor.stream_once()
    for _ in range(2):
        trained(monitor, queue.take_all(), loss=0.7, margin=-0.1)
        assert monitor.drift()["drifted"]
        assert monitor.stream_once() == 2
    trained(monitor, queue.take_all(), loss=0.1, margin=2.0)
    assert monitor.stream_once() == 0  # three epochs, and satisfied on average


def test_a_quiet_stream_is_trained_once(monitor, queue):
    post(monitor, 1, 2, 3, 4)
    monitor.stream_once()
    trained(monitor, queue.take_all(), loss=0.1, margin=2.0)
    assert not monitor.drift()["drifted"]
    assert monitor.stream_once() == 0


def test_the_last_loss_travels_with_a_repeated_pair(monitor, queue):
    post(monitor, 1, 2)
    monitor.stream_once()
    trained(monitor, queue.take_all(), loss=1.5, margin=-1.0)
    monitor.stream_once()
    assert {pair.dpo_loss for pair in queue.pairs.values()} == {1.5}
    assert {pair.times_trained for pair in queue.pairs.values()} == {1}


def test_unusable_and_failed_pairs_are_parked_with_their_reason(monitor, queue):
    first, second = post(monitor, 1, 2)
    outcome = BatchOutcome("t", "e", error="DivergedError: nan", unusable=((first, "PairTooLongError: x"),))
    monitor.record(outcome, [second], None)
    assert monitor.stream_once() == 0
    assert monitor.stats()["store"]["pairs"]["parked"] == 2


def test_held_out_pairs_never_reach_the_queue(tmp_path, queue):
    args = {"state_dir": str(tmp_path), "feedback": {"holdout_fraction": 0.5}}
    monitor = DriftMonitor(args, queue)
    post(monitor, *range(20))
    monitor.stream_once()
    held_out = {pair.pair_id for pair in monitor.held_out_pairs()}
    assert held_out
    assert not held_out & set(queue.pairs)
