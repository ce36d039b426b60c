import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.batch import ForwardShape
from core.config import SchedulerConfig
from scheduler.plan import FineTuneState, IterationView
from scheduler.priority import decode_priority, finetune_priority, prefill_priority
from scheduler.queues.task_queue import QueuedTask, TaskQueue
from tests.support.known_device import make_planner

CONFIG = SchedulerConfig()


def test_priority_grows_with_waiting_unless_ageing_is_off():
    assert prefill_priority(3.0, 0, CONFIG) == CONFIG.base_priority_prefill + 3 * CONFIG.rate_prefill
    assert prefill_priority(-3.0, 0, CONFIG) == CONFIG.base_priority_prefill
    assert decode_priority(2.0, CONFIG) == CONFIG.base_priority_decode + 2 * CONFIG.rate_decode
    still = CONFIG.model_copy(update={"ageing": False})
    assert prefill_priority(3.0, 0, still) == CONFIG.base_priority_prefill
    assert finetune_priority(1e9, 0.0, 0, still) == CONFIG.base_priority_finetune


def test_a_lower_priority_field_is_sooner_and_above_zero_is_class_batch():
    assert prefill_priority(0.0, -1, CONFIG) > prefill_priority(0.0, 0, CONFIG)
    assert prefill_priority(0.0, 1, CONFIG) == CONFIG.base_priority_batch - CONFIG.priority_step
    assert prefill_priority(0.0, 10**9, CONFIG) == prefill_priority(0.0, 10, CONFIG)


def test_the_reward_term_can_be_switched_off():
    plain = CONFIG.model_copy(update={"reward_term": False})
    assert finetune_priority(1.0, 5.0, 0, plain) == finetune_priority(1.0, 0.0, 0, plain)


def test_the_loss_term_is_clipped_decays_with_retries_and_defaults_to_ln_2():
    base = finetune_priority(0.0, 0.0, 0, CONFIG)
    assert finetune_priority(0.0, 1e9, 0, CONFIG) == base + CONFIG.gamma * CONFIG.max_loss_term
    assert finetune_priority(0.0, 2.0, 1, CONFIG) == base + CONFIG.gamma * 2.0 * CONFIG.retry_decay
    assert finetune_priority(0.0, None, 0, CONFIG) == pytest.approx(base + CONFIG.gamma * math.log(2))


def test_the_highest_loss_comes_first_and_ties_keep_their_order_of_arrival():
    queue = TaskQueue(CONFIG)
    for name, loss in (("a", 0.5), ("b", 2.0), ("c", 0.5)):
        queue.push(QueuedTask(name, name, 0.0, loss))
    assert [queue.pop().task_id for _ in range(3)] == ["b", "a", "c"]
    assert queue.pop() is None


def test_an_old_task_overtakes_a_hot_new_one():
    queue = TaskQueue(CONFIG)
    queue.push(QueuedTask("hot", None, 1000.0, CONFIG.max_loss_term))
    queue.push(QueuedTask("old", None, 0.0, 0.0))
    assert queue.pop().task_id == "old"


def test_a_removed_or_replaced_task_is_not_popped_twice():
    queue = TaskQueue(CONFIG)
    queue.push(QueuedTask("a", 1, 0.0, 1.0))
    queue.push(QueuedTask("a", 2, 0.0, 0.1))
    queue.push(QueuedTask("b", 3, 0.0, 0.5))
    queue.remove("b")
    assert len(queue) == 1
    assert queue.pop().payload == 2
    assert queue.pop() is None


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.one_of(st.none(), st.floats(0, 50)), st.integers(0, 3)), max_size=30)
)
def test_the_heap_order_is_the_order_of_priorities_at_any_later_time(tasks):
    queue = TaskQueue(CONFIG)
    for i, (arrived, loss, attempts) in enumerate(tasks):
        queue.push(QueuedTask(str(i), i, arrived, loss, attempts))
    popped = [queue.pop() for _ in tasks]
    priorities = [task.priority_at(2e3, CONFIG) for task in popped]
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(priorities))
    assert sorted(task.payload for task in popped) == list(range(len(tasks)))


def test_gamma_weighs_the_loss_and_nothing_else():
    assert finetune_priority(0.0, 2.0, 0, CONFIG, 3.0) == CONFIG.base_priority_finetune + 3.0 * 2.0
    assert finetune_priority(5.0, 2.0, 1, CONFIG, 0.0) == finetune_priority(5.0, 0.0, 0, CONFIG)
    assert finetune_priority(5.0, 2.0, 0, CONFIG, None) == finetune_priority(5.0, 2.0, 0, CONFIG, CONFIG.gamma)
    plain = CONFIG.model_copy(update={"reward_term": False})
    assert finetune_priority(0.0, 2.0, 0, plain, 9.0) == CONFIG.base_priority_finetune


def test_a_raised_gamma_lets_a_hot_task_overtake_and_a_lowered_one_takes_that_back():
    queue = TaskQueue(CONFIG)
    queue.push(QueuedTask("old", None, 0.0, 0.0))
    queue.push(QueuedTask("hot", None, 20.0, 2.0))
    queue.push(QueuedTask("gone", None, 0.0, 2.0))
    queue.remove("gone")
    assert queue.peek().task_id == "old"
    queue.set_gamma(4.0)
    assert (queue.gamma, queue.peek().task_id) == (4.0, "hot")
    queue.set_gamma(CONFIG.gamma)
    assert [queue.pop().task_id for _ in range(2)] == ["old", "hot"]
    assert queue.pop() is None


def test_the_planner_runs_a_slice_without_slack_once_gamma_lifts_its_task_above_decoding():
    def min_slices(gamma):
        planner = make_planner(base_priority_finetune=19.0, rate_finetune=0.0)
        state = FineTuneState(0.0, dpo_loss=0.9, gamma=gamma)
        view = IterationView(0.0, num_decode=4, finetune=state)
        return planner.settle(planner.plan(view), view, ForwardShape(num_decode=4)).min_slices

    assert [min_slices(gamma) for gamma in (None, 1.0, 1.2, 0.0)] == [0, 0, 1, 0]


gammas = st.floats(0, 20)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.floats(0, 1e3), st.one_of(st.none(), st.floats(0, 50)), st.integers(0, 3)),
            gammas,
            st.just("pop"),
            st.integers(0, 30),
        ),
        max_size=40,
    ),
    gammas,
)
def test_after_any_changes_of_gamma_the_order_is_that_of_the_priorities(operations, last_gamma):
    """Tuples are pushed, floats are new gammas, integers name tasks to remove."""
    queue, present = TaskQueue(CONFIG), set()
    for i, operation in enumerate(operations):
        match operation:
            case (arrived, loss, attempts):
                queue.push(QueuedTask(str(i), i, arrived, loss, attempts))
                present.add(i)
            case float():
                queue.set_gamma(operation)
            case "pop":
                task = queue.pop()
                assert (task is None) == (not present)
                present -= {task.payload} if task else set()
            case int():
                queue.remove(str(operation))
                present.discard(operation)
    queue.set_gamma(last_gamma)
    popped = [queue.pop() for _ in present]
    priorities = [task.priority_at(2e3, CONFIG, last_gamma) for task in popped]
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(priorities))
    assert {task.payload for task in popped} == present
    assert len(queue) == 0
