import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.batch import ForwardShape
from core.config import ExperimentsConfig
from scheduler.priority import (
    BASE_DECODE,
    BASE_FINETUNE,
    BASE_PREFILL,
    BASE_PREFILL_BACKGROUND,
    MAX_LOSS_TERM,
    PRIORITY_STEP,
    RATE_DECODE,
    RATE_PREFILL,
    RETRY_DECAY,
    decode_priority,
    finetune_priority,
    prefill_priority,
)
from scheduler.queues.finetune import QueuedTask, TaskQueue
from scheduler.view import FineTuneState, IterationView
from tests.support.known_device import make_planner

CONFIG = ExperimentsConfig()


def test_priority_grows_with_waiting_unless_ageing_is_off():
    assert prefill_priority(3.0, 0, CONFIG) == BASE_PREFILL + 3 * RATE_PREFILL
    assert prefill_priority(-3.0, 0, CONFIG) == BASE_PREFILL
    assert decode_priority(2.0, CONFIG) == BASE_DECODE + 2 * RATE_DECODE
    still = CONFIG.model_copy(update={"ageing": False})
    assert prefill_priority(3.0, 0, still) == BASE_PREFILL
    assert finetune_priority(1e9, 0.0, 0, 1.0, still) == BASE_FINETUNE


def test_a_lower_priority_field_is_sooner_and_above_zero_is_class_background():
    assert prefill_priority(0.0, -1, CONFIG) > prefill_priority(0.0, 0, CONFIG)
    assert prefill_priority(0.0, 1, CONFIG) == BASE_PREFILL_BACKGROUND - PRIORITY_STEP
    assert prefill_priority(0.0, 10**9, CONFIG) == prefill_priority(0.0, 10, CONFIG)


def test_the_reward_term_can_be_switched_off():
    plain = CONFIG.model_copy(update={"reward_term": False})
    assert finetune_priority(1.0, 5.0, 0, 1.0, plain) == finetune_priority(1.0, 0.0, 0, 1.0, plain)


def test_the_loss_term_is_clipped_decays_with_retries_and_defaults_to_ln_2():
    base = finetune_priority(0.0, 0.0, 0, 1.0, CONFIG)
    assert finetune_priority(0.0, 1e9, 0, 1.0, CONFIG) == base + MAX_LOSS_TERM
    assert finetune_priority(0.0, 2.0, 1, 1.0, CONFIG) == base + 2.0 * RETRY_DECAY
    assert finetune_priority(0.0, None, 0, 1.0, CONFIG) == pytest.approx(base + math.log(2))


def test_the_highest_loss_comes_first_and_ties_keep_their_order_of_arrival():
    queue = TaskQueue(CONFIG, 1.0)
    for name, loss in (("a", 0.5), ("b", 2.0), ("c", 0.5)):
        queue.push(QueuedTask(name, name, 0.0, loss))
    assert [queue.pop().task_id for _ in range(3)] == ["b", "a", "c"]
    assert queue.pop() is None


def test_an_old_task_overtakes_a_hot_new_one():
    queue = TaskQueue(CONFIG, 1.0)
    queue.push(QueuedTask("hot", None, 1000.0, MAX_LOSS_TERM))
    queue.push(QueuedTask("old", None, 0.0, 0.0))
    assert queue.pop().task_id == "old"


def test_a_removed_or_replaced_task_is_not_popped_twice():
    queue = TaskQueue(CONFIG, 1.0)
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
    queue = TaskQueue(CONFIG, 1.0)
    for i, (arrived, loss, attempts) in enumerate(tasks):
        queue.push(QueuedTask(str(i), i, arrived, loss, attempts))
    popped = [queue.pop() for _ in tasks]
    priorities = [task.priority_at(2e3, 1.0, CONFIG) for task in popped]
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(priorities))
    assert sorted(task.payload for task in popped) == list(range(len(tasks)))


def test_gamma_weighs_the_loss_and_nothing_else():
    assert finetune_priority(0.0, 2.0, 0, 3.0, CONFIG) == BASE_FINETUNE + 3.0 * 2.0
    assert finetune_priority(5.0, 2.0, 1, 0.0, CONFIG) == finetune_priority(5.0, 0.0, 0, 1.0, CONFIG)
    plain = CONFIG.model_copy(update={"reward_term": False})
    assert finetune_priority(0.0, 2.0, 0, 9.0, plain) == BASE_FINETUNE


def test_a_raised_gamma_lets_a_hot_task_overtake_and_a_lowered_one_takes_that_back():
    queue = TaskQueue(CONFIG, 1.0)
    queue.push(QueuedTask("old", None, 0.0, 0.0))
    queue.push(QueuedTask("hot", None, 20.0, 2.0))
    queue.push(QueuedTask("gone", None, 0.0, 2.0))
    queue.remove("gone")
    assert queue.peek().task_id == "old"
    queue.set_gamma(4.0)
    assert (queue.gamma, queue.peek().task_id) == (4.0, "hot")
    queue.set_gamma(1.0)
    assert [queue.pop().task_id for _ in range(2)] == ["old", "hot"]
    assert queue.pop() is None


def test_the_planner_runs_a_slice_without_slack_once_gamma_lifts_its_task_above_decoding():
    def min_slices(gamma):
        planner = make_planner()
        state = FineTuneState(0.0, dpo_loss=0.9, gamma=gamma)
        view = IterationView(90.0, num_decode=4, finetune=state)  # it has aged from 1 to 19, decoding is at 20
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
    queue, present = TaskQueue(CONFIG, 1.0), set()
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
    priorities = [task.priority_at(2e3, last_gamma, CONFIG) for task in popped]
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(priorities))
    assert {task.payload for task in popped} == present
    assert len(queue) == 0
