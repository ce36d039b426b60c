import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import ExperimentsConfig
from scheduler.priority import prefill_priority
from scheduler.queues.waiting import CLIENT_TURN, HEAD_START_S, WaitingQueue

CONFIG = ExperimentsConfig()
rows = st.lists(st.tuples(st.floats(0, 100), st.integers(-12, 12)), max_size=30)


def filled(requests, config=CONFIG):
    queue = WaitingQueue(config)
    for number, (arrived_s, user_priority) in enumerate(requests):
        queue.push(f"r{number}", number, arrived_s, user_priority)
    return queue


def test_interactive_requests_come_before_background_ones_that_arrived_earlier():
    assert filled([(0.0, 1), (5.0, 0), (6.0, 0)]).head(3, now_s=10) == [1, 2, 0]


def test_a_background_request_that_waited_long_enough_overtakes_a_fresh_interactive_one():
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


grouped_rows = st.lists(
    st.tuples(st.floats(0, 5), st.sampled_from([-1, 0, 1]), st.sampled_from([None, "a", "b", "c"])), max_size=25
)
in_use_sets = st.sets(st.sampled_from(["a", "b", "c", "d"]))


def grouped(requests, in_use=frozenset()):
    queue = WaitingQueue(CONFIG)
    for number, (arrived_s, user_priority, group) in enumerate(requests):
        queue.push(f"r{number}", number, arrived_s, user_priority, group)
    queue.set_in_use(in_use)
    return queue


def expected_order(requests, in_use, now_s):
    """The order by definition: sort all by the one priority."""

    def key(number):
        arrived_s, user_priority, group = requests[number]
        turn_s = arrived_s - (HEAD_START_S if group in in_use else 0.0)
        priority = prefill_priority(max(0.0, now_s - turn_s), user_priority, CONFIG)
        return (-priority, turn_s, arrived_s, number)

    return sorted(range(len(requests)), key=key)


def test_requests_that_share_a_prefix_with_a_running_one_go_together():
    queue = grouped([(0.0, 0, "a"), (0.1, 0, "b"), (0.2, 0, "a"), (0.3, 0, None), (0.4, 0, "b")])
    assert queue.head(5, 1.0) == [0, 1, 2, 3, 4]
    queue.set_in_use({"b"})
    assert queue.head(5, 1.0) == [1, 4, 0, 2, 3]
    queue.set_in_use({"a"})
    assert queue.head(5, 1.0) == [0, 2, 1, 3, 4]


def test_one_that_comes_while_its_prefix_is_in_use_goes_with_it_at_once():
    queue = grouped([(0.0, 0, None)], {"a"})
    queue.push("late", "late", 0.3, 0, "a")
    assert queue.head(2, 1.0) == ["late", 0]


def test_one_that_waited_longer_than_the_head_start_is_not_overtaken():
    queue = grouped([(0.0, 0, None), (0.49, 0, "a"), (0.51, 0, "a")], {"a"})
    assert queue.head(3, 1.0) == [1, 0, 2]


def test_the_head_start_does_not_lift_a_background_request_over_interactive_ones():
    assert grouped([(0.0, 1, "a"), (0.4, 0, None)], {"a"}).head(2, 1.0) == [1, 0]


def test_the_ablation_is_the_order_of_arrival():
    queue = WaitingQueue(ExperimentsConfig(prefix_order=False))
    for number, group in enumerate(["a", None, "a"]):
        queue.push(f"r{number}", number, float(number) / 10, 0, group)
    queue.set_in_use({"a"})
    assert queue.head(3, 1.0) == [0, 1, 2]


@given(grouped_rows, in_use_sets, st.floats(0, 10))
def test_with_prefixes_the_order_is_that_of_the_one_priority(requests, in_use, now_s):
    queue = grouped(requests, in_use)
    expected = expected_order(requests, in_use, now_s)
    assert list(queue.iterate(now_s)) == expected
    assert queue.head(3, now_s) == expected[:3]
    assert [queue.pop(now_s) for _ in requests] == expected


@given(grouped_rows, st.lists(st.one_of(in_use_sets, st.integers(0, 24)), max_size=12), st.floats(0, 10))
def test_the_order_stays_right_while_prefixes_come_in_use_and_requests_leave_and_return(requests, steps, now_s):
    queue = grouped(requests)
    present, in_use = set(range(len(requests))), set()
    for step in steps:
        if isinstance(step, set):
            in_use = step
            queue.set_in_use(in_use)
        elif step in present:
            present.remove(step)
            queue.remove(f"r{step}")
    assert list(queue.iterate(now_s)) == [n for n in expected_order(requests, in_use, now_s) if n in present]


@given(grouped_rows, in_use_sets, st.floats(0, 10))
def test_nobody_is_overtaken_by_one_of_its_priority_that_came_a_head_start_later(requests, in_use, now_s):
    order = list(grouped(requests, in_use).iterate(now_s))
    for place, first in enumerate(order):
        for later in order[place + 1 :]:
            if requests[first][1] == requests[later][1]:
                assert requests[first][0] - requests[later][0] <= HEAD_START_S


@given(st.floats(0.02, 1.0), st.integers(0, 30))
def test_a_stream_of_sharing_requests_cannot_starve_a_lone_one(gap_s, queued_before):
    """One request served each `gap_s`, one of a running group arriving each time: the worst that can be asked."""
    queue = WaitingQueue(CONFIG)
    for number in range(queued_before):
        queue.push(f"before-{number}", "before", 0.0, 0, "a")
    queue.push("lone", "lone", 0.0)
    queue.set_in_use({"a"})
    overtakers = 0
    for number in range(1, 200):
        queue.push(f"r{number}", "later", number * gap_s, 0, "a")
        served = queue.pop(number * gap_s)
        if served == "lone":
            break
        overtakers += served == "later"
    assert served == "lone"
    assert overtakers <= HEAD_START_S / gap_s


def sent(*requests):
    """A queue of `(client, arrival)`, and the names in the order in which they were pushed."""
    queue = WaitingQueue(CONFIG)
    for number, (client, arrived_s) in enumerate(requests):
        queue.push(f"{client}{number}", f"{client}{number}", arrived_s, client=client)
    return queue


def test_a_client_is_never_behind_anothers_hundred():
    queue = sent(*[("a", 0.0)] * 100, ("b", 5.0))
    assert queue.head(CLIENT_TURN + 1, 6.0)[-1] == "b100"


def test_the_hundred_take_turns_with_a_client_that_never_stops():
    queue, served, now_s = sent(*[("a", 0.0)] * 100), [], 1.0
    for number in range(400):
        queue.push(f"b{number}", f"b{number}", now_s, client="b")
        served.append(queue.pop(now_s)[0])
        now_s += 1.0
    assert served.count("a") == 100  # and the last of them not at the end of all time
    assert "".join(served).rindex("a") < 2 * 100 + 2 * CLIENT_TURN


def test_alone_a_client_is_served_in_the_order_of_arrival():
    queue = sent(*[("a", float(number)) for number in range(50)])
    assert [queue.pop(60.0) for _ in range(50)] == [f"a{number}" for number in range(50)]


def test_clients_of_one_request_each_are_served_in_the_order_of_arrival():
    queue = sent(*[(f"c{number}-", float(number)) for number in range(50)])
    assert queue.head(50, 60.0) == [f"c{number}-{number}" for number in range(50)]


def test_a_request_that_is_put_back_keeps_its_round():
    queue = sent(*[("a", 0.0)] * 20)
    skipped = [queue.pop(1.0) for _ in range(20)]
    for number, name in enumerate(skipped):
        queue.push(name, name, 0.0, client="a", at_round=number // CLIENT_TURN)
    queue.push("b", "b", 2.0, client="b")
    assert queue.head(CLIENT_TURN + 1, 3.0)[-1] == "b"


def test_the_oldest_arrival_is_that_of_all_rounds():
    queue = sent(*[("b", 3.0)] * 3, *[("a", 1.0)] * 30)
    for _ in range(11):
        queue.pop(5.0)
    assert queue.oldest_arrival_s() == 1.0


def test_a_guest_is_first_until_the_next_invitation_and_moves_no_turn():
    queue = WaitingQueue(CONFIG)
    for number in range(3 * CLIENT_TURN):
        queue.push(f"m{number}", f"m{number}", float(number), client="many")
    queue.push("ours", "ours", 40.0)
    queue.push("late", "late", 50.0, client="lone")
    assert not queue.invite({"many", "lone"}, now_s=60.0)
    assert queue.invite({"many"}, now_s=60.0)
    everybody = list(queue.iterate(60.0))
    assert everybody[:2] == ["late", "m0"]
    assert len(everybody) == len(set(everybody)) == len(queue)
    assert queue.peek(60.0) == queue.pop(60.0) == "late"
    assert not queue.invite({"many"}, now_s=60.0)  # nobody's request is nobody's guest
    assert queue.pop(60.0) == "m0"


def test_an_invited_request_that_is_taken_out_leaves_the_order_as_it_was():
    queue = WaitingQueue(CONFIG)
    for name, client in (("a", "many"), ("b", "lone"), ("c", "other")):
        queue.push(name, name, 0.0, client=client)
    assert queue.invite({"many"}, now_s=1.0)
    queue.remove("b")
    assert queue.head(3, 1.0) == ["a", "c"]
    assert queue.invite({"many"}, now_s=1.0)
    assert queue.head(3, 1.0) == ["c", "a"]
