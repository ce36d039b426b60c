import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import SchedulerConfig
from scheduler.priority import prefill_priority
from scheduler.waiting import WaitingQueue

CONFIG = SchedulerConfig(base_priority_prefill=10, rate_prefill=1, base_priority_batch=5, rate_batch=0.2)
rows = st.lists(st.tuples(st.floats(0, 100), st.integers(-12, 12)), max_size=30)


def filled(requests, config=CONFIG):
    queue = WaitingQueue(config)
    for number, (arrived_s, user_priority) in enumerate(requests):
        queue.push(f"r{number}", number, arrived_s, user_priority)
    return queue


def test_interactive_requests_come_before_batch_ones_that_arrived_earlier():
    assert filled([(0.0, 1), (5.0, 0), (6.0, 0)]).head(3, now_s=10) == [1, 2, 0]


def test_a_batch_request_that_waited_long_enough_overtakes_a_fresh_interactive_one():
    queue = filled([(0.0, 1), (1000.0, 0)])
    assert queue.peek(now_s=1000.0) == 0


def test_without_ageing_it_never_does():
    queue = filled([(0.0, 1), (1000.0, 0)], CONFIG.model_copy(update={"ageing": False}))
    assert queue.peek(now_s=1000.0) == 1


def test_a_preempted_request_comes_back_to_the_front():
    queue = filled([(0.0, 0), (1.0, 0)])
    assert queue.pop(2.0) == 0
    queue.push("r0", 0, 0.0, 0)
    assert queue.peek(2.0) == 0


def test_an_empty_queue_says_so():
    with pytest.raises(IndexError, match="no request is waiting"):
        filled([]).pop(0.0)


@given(rows, st.floats(0, 200))
def test_the_order_is_total_priority_then_arrival_then_sequence(requests, now_s):
    def key(number):
        arrived_s, user_priority = requests[number]
        return (-prefill_priority(now_s - arrived_s, user_priority, CONFIG), arrived_s, number)

    queue = filled(requests)
    ordered = list(queue.iterate(now_s))
    assert ordered == sorted(range(len(requests)), key=key)
    assert [queue.pop(now_s) for _ in requests] == ordered
    assert len(queue) == 0


@given(rows, st.data())
def test_removed_requests_are_gone_and_the_others_stay(requests, data):
    queue = filled(requests)
    gone = data.draw(st.sets(st.sampled_from(range(len(requests))))) if requests else set()
    for number in gone:
        assert queue.remove(f"r{number}") == number
        assert queue.remove(f"r{number}") is None
    assert sorted(queue.iterate(50.0)) == [n for n in range(len(requests)) if n not in gone]
