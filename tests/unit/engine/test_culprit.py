"""The search for the request that makes iterations fail, whatever the batch, the culprits and what is scheduled."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.vllm.culprit import PROBE, CulpritSearch, UnexplainedFailureError

MAX_REQUESTS = 40


class Engine:
    """Runs what the search admits, and fails if `fails(batch)` says so; a batch holds `seats` requests at most."""

    def __init__(self, num_requests, fails, seats=MAX_REQUESTS):
        self.alive = [f"r{number}" for number in range(num_requests)]
        self.fails, self.seats = fails, seats
        self.search = CulpritSearch()
        self.ended = {}
        self.num_passed, self.num_failed = Counter(), 0

    def end(self, errors):
        self.ended.update(errors)
        self.alive = [name for name in self.alive if name not in errors]

    def leave(self, name):
        self.alive.remove(name)
        self.search.keep(self.is_there)

    def is_there(self, name):
        return name == PROBE or name in self.alive

    def run(self, times):
        for _ in range(times):
            self.iterate()

    def iterate(self):
        """One iteration; a group that does not fit waits for its turn."""
        group = self.search.group
        wanted = [name for name in group or self.alive if self.is_there(name)]
        batch, left = wanted[: self.seats], wanted[self.seats :]
        if batch and self.fails(batch):
            self.num_failed += 1
            self.end(self.search.failed(batch, "boom"))
        elif group:
            self.num_passed.update(batch)
            self.end(self.search.passed(left, has_run=bool(batch)))
        else:
            self.num_passed.update(batch)
            self.search.note_good()

    def settle(self):
        """Run until a whole round passes with nothing searched."""
        for _ in range(8 * MAX_REQUESTS):
            self.iterate()
            if not self.search.group and (not self.alive or not self.fails(self.alive[: self.seats])):
                return
        raise AssertionError("the search does not end")


numbers = st.integers(1, MAX_REQUESTS)


@given(numbers, st.sets(st.integers(0, MAX_REQUESTS - 1)), numbers)
def test_exactly_the_culprits_are_ended_after_a_bounded_number_of_failures(num_requests, culprits, seats):
    guilty = {f"r{number}" for number in culprits if number < num_requests}
    engine = Engine(num_requests, lambda batch: bool(guilty & set(batch)), seats)
    engine.settle()
    while engine.alive and guilty - set(engine.ended):  # those that did not fit into the first batch
        engine.alive = engine.alive[engine.seats :]
        engine.settle()
    assert set(engine.ended) == guilty
    assert engine.num_failed <= 1 + len(guilty) * (2 + math.ceil(math.log2(min(num_requests, seats))))


@given(numbers, numbers)
def test_a_failure_that_does_not_come_back_costs_nobody_and_all_ran_again(num_requests, seats):
    failures = iter([True])
    engine = Engine(num_requests, lambda _: next(failures, False), seats)
    engine.iterate()
    assert engine.search.group
    while engine.search.group:
        engine.iterate()
    assert not engine.ended
    assert set(engine.num_passed) >= set(engine.alive[:seats])


@given(numbers)
def test_a_device_that_fails_for_everybody_ends_the_engine_soon_and_nobody_is_blamed(num_requests):
    engine = Engine(num_requests, lambda _: True)
    with pytest.raises(UnexplainedFailureError, match="whatever request is in them: boom"):
        engine.run(2 * num_requests + 1)
    assert engine.num_failed <= 3 + math.ceil(math.log2(num_requests))
    assert not engine.ended


def test_a_failure_of_more_than_one_request_together_ends_the_engine_after_some_rounds():
    engine = Engine(4, lambda batch: len(batch) > 2)
    with pytest.raises(UnexplainedFailureError, match="no request alone"):
        engine.run(100)
    assert engine.num_failed == 4
    assert not engine.ended


def test_failures_without_a_culprit_are_forgiven_after_a_thousand_good_iterations():
    failing = set()
    engine = Engine(2, lambda _: bool(failing and failing.pop()))
    for _ in range(10):
        failing.add("once")
        engine.run(1010)
    assert engine.num_failed == 10
    assert not engine.ended


@given(st.data())
def test_requests_may_leave_at_any_time(data):
    num_requests = data.draw(numbers)
    guilty = {f"r{number}" for number in data.draw(st.sets(st.integers(0, MAX_REQUESTS - 1), max_size=4))}
    engine = Engine(num_requests, lambda batch: bool(guilty & set(batch)))
    for _ in range(8 * MAX_REQUESTS):
        engine.iterate()
        if engine.alive and data.draw(st.booleans()):
            engine.leave(data.draw(st.sampled_from(engine.alive)))
    assert not engine.search.group
    assert set(engine.ended) <= guilty
    assert not guilty & set(engine.alive)
