import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import ExperimentsConfig
from scheduler.queues.finetune import MixedQueue, QueuedTask, ScoringQueue

SHARES = {"new": 0.5, "hard": 0.25, "replay": 0.25}


def queue_of(tasks, gamma=1.0):
    """`tasks` are (id, role, loss); all arrived at once."""
    queue = MixedQueue(ExperimentsConfig(), gamma, SHARES)
    for task_id, role, loss in tasks:
        queue.push(QueuedTask(task_id, task_id, 0.0, loss), role)
    return queue


def many(role, count, loss=1.0):
    return [(f"{role}{i}", role, loss) for i in range(count)]


def roles(batch):
    return sorted(task.task_id.rstrip("0123456789") for task in batch)


def test_a_batch_has_its_share_of_each_role_whatever_the_losses():
    queue = queue_of(many("new", 20, 0.1) + many("hard", 20, 5.0) + many("replay", 20, 0.0))
    assert roles(queue.pop_batch(8)) == ["hard"] * 2 + ["new"] * 4 + ["replay"] * 2


def test_what_one_role_cannot_fill_goes_to_the_highest_priorities():
    queue = queue_of(many("new", 1) + many("hard", 20, 5.0) + many("replay", 20, 0.0))
    assert roles(queue.pop_batch(8)) == ["hard"] * 5 + ["new"] + ["replay"] * 2


def test_within_a_role_the_highest_loss_goes_first():
    queue = queue_of([("a", "new", 0.1), ("b", "new", 3.0), ("c", "new", 1.0)])
    assert [task.task_id for task in queue.pop_batch(2)] == ["b", "c"]


def test_a_task_that_was_removed_is_not_popped():
    queue = queue_of([("a", "new", 0.1), ("b", "replay", 3.0)])
    assert queue.remove("b")
    assert not queue.remove("b")
    assert [task.task_id for task in queue.pop_batch(2)] == ["a"]


def test_peek_is_the_highest_priority_of_all_roles():
    queue = queue_of([("a", "new", 0.1), ("b", "replay", 0.2)])
    assert queue.peek().task_id == "b"
    assert queue_of([]).peek() is None


def test_gamma_changes_the_order_of_what_is_queued():
    queue = MixedQueue(ExperimentsConfig(), 0.0, {"new": 1.0})
    queue.push(QueuedTask("old", None, 0.0, 0.1), "new")
    queue.push(QueuedTask("wrong", None, 2.0, 4.0), "new")
    assert queue.peek().task_id == "old"
    queue.set_gamma(2.0)
    assert queue.peek().task_id == "wrong"


@given(
    st.lists(st.tuples(st.sampled_from(sorted(SHARES)), st.floats(0, 5)), max_size=40),
    st.integers(1, 12),
)
def test_every_task_comes_out_once_and_batches_are_full_while_there_is_work(tasks, size):
    queue = queue_of([(str(i), role, loss) for i, (role, loss) in enumerate(tasks)])
    out = []
    while len(queue):
        batch = queue.pop_batch(size)
        assert len(batch) == min(size, len(tasks) - len(out))
        out += [task.task_id for task in batch]
    assert sorted(out, key=int) == [str(i) for i in range(len(tasks))]
    assert queue.pop_batch(size) == []


def test_pairs_to_score_come_in_order():
    queue = ScoringQueue()
    for name in "abc":
        queue.push(name, name.upper())
    queue.push("a", "again")
    assert queue.pop_batch(2) == (["A", "B"], 0)
    assert list(queue.ids()) == ["c"]


def test_after_a_failure_pairs_are_scored_one_by_one():
    queue = ScoringQueue()
    queue.push("a", "A", attempts=1)
    queue.push("b", "B")
    queue.push("c", "C", attempts=1)
    assert queue.pop_batch(8) == (["A"], 1)
    assert queue.pop_batch(8) == (["B"], 0)
    assert queue.pop_batch(8) == (["C"], 1)
    assert len(queue) == 0
    with pytest.raises(StopIteration):
        queue.pop_batch(1)
