import asyncio
import json
import math

import pytest

from core.config import AppArgs
from core.types import TaskKind
from core.wire import HORIZON_S, BatchOutcome, ExecutorLoad, Headroom, TrainingPair
from deployments.control.central_scheduler import LEASE_S, MAX_ATTEMPTS, CentralScheduler
from tests.support.clock import Clock

BATCH, MAX_AGE_S = 4, 20.0


@pytest.fixture
def clock():
    return Clock(100.0)


@pytest.fixture
def scheduler(clock):
    training = {"pairs_per_step": BATCH, "max_age_s": MAX_AGE_S}
    return CentralScheduler(AppArgs.model_validate({"training": training}), clock)


def pairs(*names, loss=None, times_trained=0):
    return [TrainingPair(name, "q", "good", "bad", loss, times_trained) for name in names]


def room(executor="e1", memory_bytes=1e9, latency_s=HORIZON_S, may_train=True):
    return Headroom(executor, memory_bytes, latency_s, refusal="" if may_train else "v0001 is pinned")


def known(scheduler, what="train"):
    return scheduler.known_pair_ids()[what]


def ids(batch):
    return [pair.pair_id for pair in batch.pairs]


def test_a_full_batch_is_given_at_once_highest_loss_first(scheduler):
    scheduler.enqueue(pairs("a", "b", "c", loss=0.1) + pairs("d", loss=3.0) + pairs("e", loss=0.2))
    assert ids(scheduler.poll(room())) == ["d", "e", "a", "b"]


def test_a_part_of_a_batch_waits_until_it_is_old(scheduler, clock):
    scheduler.enqueue(pairs("a", "b"))
    assert scheduler.poll(room()) is None
    clock.now_s += MAX_AGE_S
    assert ids(scheduler.poll(room())) == ["a", "b"]


def test_pairs_that_were_trained_before_do_not_wait_for_a_full_batch(scheduler):
    scheduler.enqueue(pairs("a", times_trained=1))
    assert ids(scheduler.poll(room())) == ["a"]


def test_a_pair_is_never_queued_or_leased_twice(scheduler):
    scheduler.enqueue(pairs(*"abcd"))
    scheduler.enqueue(pairs(*"abcd"))
    scheduler.poll(room())
    scheduler.enqueue(pairs(*"abcd"))
    assert sorted(known(scheduler)) == list("abcd")
    assert scheduler.stats()["queued_pairs"] == 0


def test_a_completed_batch_is_forgotten(scheduler):
    scheduler.enqueue(pairs(*"abcd"))
    batch = scheduler.poll(room())
    scheduler.complete(BatchOutcome(batch.task_id, "e1", busy_s=1.0, peak_bytes=100))
    assert known(scheduler) == []


def test_of_what_was_cleared_nothing_comes_back(scheduler):
    scheduler.enqueue(pairs(*"abcde"))
    scheduler.enqueue_scoring(pairs("s"))
    scheduler.poll(room())
    batch = scheduler.poll(room())
    scheduler.clear()
    scheduler.complete(BatchOutcome(batch.task_id, "e1", error="late"))
    assert known(scheduler) == known(scheduler, "score") == []
    scheduler.enqueue(pairs(*"abcd"))
    assert len(ids(scheduler.poll(room()))) == BATCH


def test_a_failed_batch_comes_back_until_its_attempts_are_used_up(scheduler, clock):
    scheduler.enqueue(pairs(*"abcd"))
    for attempt in range(1, MAX_ATTEMPTS + 1):
        batch = scheduler.poll(room())
        outcome = BatchOutcome(batch.task_id, "e1", error="DivergedError: nan")
        expected = list("abcd") if attempt == MAX_ATTEMPTS else []
        assert sorted(scheduler.failed_for_good(outcome)) == expected
        scheduler.complete(outcome)
    assert known(scheduler) == []


def test_an_unusable_pair_does_not_come_back(scheduler):
    scheduler.enqueue(pairs(*"abcd"))
    batch = scheduler.poll(room())
    scheduler.complete(BatchOutcome(batch.task_id, "e1", error="x", unusable=(("b", "too long"),)))
    assert sorted(known(scheduler)) == ["a", "c", "d"]


def test_a_lease_that_is_not_heard_of_expires(scheduler, clock):
    scheduler.enqueue(pairs(*"abcd"))
    first = scheduler.poll(room("e1"))
    clock.now_s += LEASE_S
    second = scheduler.poll(room("e2"))
    assert ids(second) == ids(first)


def test_a_heartbeat_keeps_a_lease_as_long_as_it_takes(scheduler, clock):
    scheduler.enqueue(pairs(*"abcd"))
    scheduler.poll(room("e1"))
    for _ in range(20):
        clock.now_s += LEASE_S / 2
        scheduler.heartbeat("e1")
        assert scheduler.poll(room("e2")) is None
    clock.now_s += LEASE_S
    assert scheduler.poll(room("e2")) is not None


def test_an_executor_that_asks_again_has_forgotten_its_lease(scheduler):
    scheduler.enqueue(pairs(*"abcd"))
    first = scheduler.poll(room())
    assert ids(scheduler.poll(room())) == ids(first)


def test_the_better_fitting_executor_gets_the_batch(scheduler):
    scheduler.enqueue(pairs(*"abcdefgh"))
    batch = scheduler.poll(room("warm-up"))
    scheduler.complete(BatchOutcome(batch.task_id, "warm-up", busy_s=4.0, peak_bytes=800_000))
    scheduler.poll(room("roomy", memory_bytes=1e9))  # both have reported now
    assert scheduler.poll(room("roomy", memory_bytes=1e9, may_train=False)) is None  # gives back what it had
    assert scheduler.poll(room("tight", memory_bytes=1e6, latency_s=5.0)) is not None


def test_an_executor_without_memory_for_a_batch_gets_none(scheduler):
    scheduler.enqueue(pairs(*"abcd"))
    batch = scheduler.poll(room())
    scheduler.complete(BatchOutcome(batch.task_id, "e1", busy_s=1.0, peak_bytes=4_000))
    scheduler.enqueue(pairs(*"efgh"))
    assert scheduler.poll(room(memory_bytes=3_000)) is None
    assert scheduler.poll(room(memory_bytes=5_000)) is not None


def test_a_busy_executor_that_is_alone_still_trains(scheduler):
    scheduler.enqueue(pairs(*"abcd"))
    batch = scheduler.poll(room())
    scheduler.complete(BatchOutcome(batch.task_id, "e1", busy_s=60.0, peak_bytes=1))
    scheduler.enqueue(pairs(*"efgh"))
    assert scheduler.poll(room(latency_s=0.1)) is not None


def test_tau_mem_of_an_executors_memory_may_be_filled_and_no_more(clock):
    args = {"training": {"pairs_per_step": BATCH}, "scheduler": {"tau_mem": 0.5}}
    scheduler = CentralScheduler(AppArgs.model_validate(args), clock)
    scheduler.enqueue(pairs(*"abcd"))
    batch = scheduler.poll(room())
    scheduler.complete(BatchOutcome(batch.task_id, "e1", busy_s=1.0, peak_bytes=4_000))
    scheduler.enqueue(pairs(*"efgh"))
    assert scheduler.poll(room(memory_bytes=7_999)) is None
    assert scheduler.poll(room(memory_bytes=8_000)) is not None


def fleet_of(packing, clock):
    """A scheduler that knows a batch to take 400 kB and 4 s, with `a-roomy` and `b-tight` free."""
    args = {"training": {"pairs_per_step": BATCH}, "experiments": {"packing": packing}}
    scheduler = CentralScheduler(AppArgs.model_validate(args), clock)
    scheduler.enqueue(pairs(*"abcd"))
    batch = scheduler.poll(room("b-tight", 1e6, 5.0))
    scheduler.complete(BatchOutcome(batch.task_id, "b-tight", busy_s=4.0, peak_bytes=400_000))
    assert scheduler.poll(room("a-roomy")) is None  # nothing to do: only a report
    scheduler.enqueue(pairs(*"efgh"))
    return scheduler


def test_best_fit_gives_the_batch_to_the_tighter_executor(clock):
    scheduler = fleet_of("best_fit", clock)
    assert scheduler.poll(room("a-roomy")) is None
    assert scheduler.poll(room("b-tight", 1e6, 5.0)) is not None


def test_first_fit_gives_it_to_the_first_in_order_of_ids_that_has_room(clock):
    scheduler = fleet_of("first_fit", clock)
    assert scheduler.poll(room("b-tight", 1e6, 5.0)) is None
    assert scheduler.poll(room("a-roomy", memory_bytes=100_000)) is None
    assert scheduler.poll(room("b-tight", 1e6, 5.0)) is not None


def test_executors_that_do_not_know_their_memory_yet_are_ordered_by_id(clock):
    scheduler = fleet_of("best_fit", clock)
    scheduler.poll(room("b-tight", float("inf")))
    scheduler.enqueue(pairs(*"ijkl"))
    clock.now_s += 1
    assert scheduler.poll(room("b-tight", float("inf"), may_train=False)) is None  # gives back what it had
    assert scheduler.poll(room("c", float("inf"))) is None
    assert scheduler.poll(room("a-roomy", float("inf"))) is not None


def test_without_the_reward_term_the_loss_orders_nothing(clock):
    args = {"training": {"pairs_per_step": 1}, "experiments": {"reward_term": False}}
    scheduler = CentralScheduler(AppArgs.model_validate(args), clock)
    scheduler.enqueue(pairs("first", loss=0.1))
    clock.now_s += 0.1
    scheduler.enqueue(pairs("second", loss=5.0))
    assert ids(scheduler.poll(room())) == ["first"]


def load(executor, waiting_tokens=0, prompt_token_s=0.001):
    return ExecutorLoad(
        executor, 0.0, 9e8, 1e9, 1000.0, 1.0, waiting_tokens=waiting_tokens, prompt_token_s=prompt_token_s
    )


def report(scheduler, executor, **changes):
    scheduler.poll(Headroom(executor, 1e9, HORIZON_S, load(executor, **changes)))


def placed(scheduler):
    return [ranked["executor_id"] for ranked in scheduler.stats()["placement"]]


def test_the_executors_of_fresh_reports_are_ranked(scheduler, clock):
    report(scheduler, "busy", waiting_tokens=500)
    report(scheduler, "free")
    scheduler.poll(room("silent"))  # reports no load
    assert placed(scheduler) == ["free", "busy"]
    clock.now_s += 60
    report(scheduler, "busy", waiting_tokens=500)
    assert placed(scheduler) == ["busy"]


def test_stats_show_where_a_prompt_would_go_and_are_json(scheduler):
    report(scheduler, "new", prompt_token_s=None)
    report(scheduler, "known")
    placement = json.loads(json.dumps(scheduler.stats(), allow_nan=False))["placement"]
    assert [entry["executor_id"] for entry in placement] == ["known", "new"]
    assert placement[0]["meets_target"]
    assert placement[1]["predicted_ttft_s"] is None


def of_role(role, *names):
    return [TrainingPair(name, "q", "good", "bad", 1.0, 1, role=role) for name in names]


def test_a_batch_mixes_new_hard_and_replayed_pairs(scheduler):
    scheduler.enqueue(of_role("replay", "r1", "r2") + of_role("hard", "h1", "h2") + of_role("new", *"abcdef"))
    assert sorted(ids(scheduler.poll(room()))) == ["a", "b", "h1", "r1"]


def test_pairs_to_score_go_first_and_then_in_turns_with_training(scheduler):
    scheduler.enqueue(pairs(*"abcdefgh"))
    scheduler.enqueue_scoring(pairs("s1", "s2"))
    kinds = []
    for number in range(4):
        batch = scheduler.poll(room())
        kinds.append(batch.kind)
        scheduler.complete(BatchOutcome(batch.task_id, "e1", kind=batch.kind))
        scheduler.enqueue_scoring(pairs(f"t{number}"))
    assert kinds == [TaskKind.EVALUATE, TaskKind.TRAIN, TaskKind.EVALUATE, TaskKind.TRAIN]


def test_scoring_does_not_wait_for_a_full_batch_and_knows_its_pairs(scheduler):
    scheduler.enqueue_scoring(pairs("s1"))
    assert known(scheduler, "score") == ["s1"]
    batch = scheduler.poll(room())
    scheduler.enqueue_scoring(pairs("s1"))  # leased: left as it is
    assert known(scheduler, "score") == ["s1"]
    scheduler.complete(BatchOutcome(batch.task_id, "e1", kind=TaskKind.EVALUATE))
    assert known(scheduler, "score") == []


def test_an_executor_that_may_not_train_still_scores(scheduler):
    scheduler.enqueue(pairs(*"abcd"))
    scheduler.enqueue_scoring(pairs("s1"))
    pinned = Headroom("e1", 1e9, HORIZON_S, refusal="v0001 is pinned")
    batch = scheduler.poll(pinned)
    assert batch.kind is TaskKind.EVALUATE
    scheduler.complete(BatchOutcome(batch.task_id, "e1", kind=batch.kind))
    assert scheduler.poll(pinned) is None
    assert scheduler.poll(room()) is not None


def test_the_bad_pair_of_a_scoring_batch_is_found_and_parked_alone(scheduler):
    scheduler.enqueue_scoring(pairs("good", "bad", "fine"))
    parked, scored = [], []
    for _ in range(20):
        batch = scheduler.poll(room())
        if batch is None:
            break
        error = "TrainingError: x" if "bad" in ids(batch) else None
        outcome = BatchOutcome(batch.task_id, "e1", error=error, kind=batch.kind)
        parked += scheduler.failed_for_good(outcome)
        scored += [] if error else ids(batch)
        scheduler.complete(outcome)
    assert parked == ["bad"]
    assert sorted(scored) == ["fine", "good"]
    assert known(scheduler, "score") == []


def test_withdrawn_pairs_are_not_handed_out(scheduler):
    scheduler.enqueue(pairs(*"abcde"))
    assert scheduler.withdraw(["a", "x"]) == 1
    assert "a" not in ids(scheduler.poll(room()))
    assert "a" not in known(scheduler, "train")


def test_gamma_travels_with_every_batch(scheduler):
    scheduler.enqueue(pairs(*"abcd"))
    scheduler.set_gamma(2.5)
    assert scheduler.poll(room()).gamma == 2.5
    assert scheduler.stats()["gamma"] == 2.5


def test_a_small_first_batch_does_not_make_full_ones_look_too_large(scheduler, clock):
    """What a step holds does not grow with its pairs: gradients, and one micro-batch after the other."""
    scheduler.enqueue(pairs("a"))
    clock.now_s += MAX_AGE_S
    batch = scheduler.poll(room(memory_bytes=4e9))
    scheduler.complete(BatchOutcome(batch.task_id, "e1", busy_s=1.0, peak_bytes=3_000_000_000))
    scheduler.enqueue(pairs(*"bcde"))
    assert scheduler.poll(room(memory_bytes=4e9)) is not None


def test_only_the_pairs_that_failed_often_are_parked(scheduler, clock):
    scheduler.enqueue(pairs("bad"))
    for _ in range(MAX_ATTEMPTS - 1):
        clock.now_s += MAX_AGE_S
        batch = scheduler.poll(room())
        scheduler.complete(BatchOutcome(batch.task_id, "e1", error="DivergedError: x"))
    scheduler.enqueue(pairs("good", loss=0.0))
    clock.now_s += MAX_AGE_S
    batch = scheduler.poll(room())
    assert sorted(ids(batch)) == ["bad", "good"]
    outcome = BatchOutcome(batch.task_id, "e1", error="DivergedError: x")
    assert scheduler.failed_for_good(outcome) == ["bad"]
    scheduler.complete(outcome)
    assert known(scheduler) == ["good"]


def waits(scheduler, headroom=None, limit_s=0.0):
    """Does a wait of no length find work? In virtual time, so that nothing is waited for."""
    return asyncio.run(scheduler.wait_for_work(headroom or room(), limit_s))


def test_a_wait_ends_when_a_poll_would_lease_something_and_leases_nothing(scheduler, clock):
    assert not waits(scheduler)
    scheduler.enqueue(pairs("a", "b"))
    assert not waits(scheduler)  # too few, and not old
    clock.now_s += MAX_AGE_S
    assert waits(scheduler)
    assert scheduler.stats()["leased_batches"] == 0
    assert ids(scheduler.poll(room())) == ["a", "b"]


def test_a_wait_for_pairs_to_score_ends_although_nothing_may_be_trained(scheduler):
    pinned = room(may_train=False)
    scheduler.enqueue(pairs(*"abcd"))
    assert not waits(scheduler, pinned)
    scheduler.enqueue_scoring(pairs("s"))
    assert waits(scheduler, pinned)


def test_what_an_executor_that_is_gone_had_ends_the_wait_of_another(scheduler, clock):
    scheduler.enqueue(pairs(*"abcd"))
    scheduler.poll(room("e1"))
    assert not waits(scheduler, room("e1"))  # it is at work: whoever waits there has given up
    assert not waits(scheduler, room("e2"))
    assert scheduler.next_due_s() == clock.now_s + LEASE_S
    clock.now_s += LEASE_S
    assert waits(scheduler, room("e2"))


def test_what_falls_due_by_itself_is_known_in_advance(scheduler, clock):
    assert scheduler.next_due_s() == math.inf
    scheduler.enqueue(pairs("a"))
    assert scheduler.next_due_s() == clock.now_s + 1.0  # priorities age
    clock.now_s += MAX_AGE_S - 0.25
    assert scheduler.next_due_s() == clock.now_s + 0.25


@pytest.mark.parametrize("what", ["enqueue", "enqueue_scoring"])
def test_a_waiting_executor_is_woken_by_new_pairs(what):
    scheduler = CentralScheduler(AppArgs())

    async def scenario():
        async with asyncio.timeout(10):
            waiting = asyncio.create_task(scheduler.wait_for_work(room(), 60.0))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            getattr(scheduler, what)(pairs("a", times_trained=1))
            return await waiting

    assert asyncio.run(scenario())


def test_all_who_wait_are_woken_and_the_best_fit_has_work():
    scheduler = CentralScheduler(AppArgs())

    async def scenario():
        async with asyncio.timeout(10):
            waits = [asyncio.create_task(scheduler.wait_for_work(room(name), 0.2)) for name in ("e1", "e2")]
            await asyncio.sleep(0.01)
            scheduler.enqueue(pairs("a", times_trained=1))
            return await asyncio.gather(*waits)

    assert sorted(asyncio.run(scenario())) == [False, True]


def standstill(scheduler):
    return scheduler.stats()["standstill"]


def test_nothing_to_do_is_no_standstill_and_neither_is_work_under_way(scheduler):
    assert standstill(scheduler) is None
    scheduler.enqueue(pairs(*"abcd"))
    assert standstill(scheduler) == {"for_s": 0.0, "reasons": ["no executor has asked for work yet"]}
    batch = scheduler.poll(room())
    assert standstill(scheduler) is None
    scheduler.complete(BatchOutcome(batch.task_id, "e1"))
    assert standstill(scheduler) is None


def test_work_that_nobody_gets_for_lack_of_memory_says_so_and_since_when(scheduler, clock):
    scheduler.enqueue(pairs(*"abcd"))
    batch = scheduler.poll(room())
    scheduler.complete(BatchOutcome(batch.task_id, "e1", busy_s=1.0, peak_bytes=3 << 30))
    scheduler.enqueue(pairs(*"efgh"))
    clock.now_s += 90
    assert scheduler.poll(room(memory_bytes=1 << 30)) is None
    (reason,) = standstill(scheduler)["reasons"]
    assert reason == "e1: a batch takes 3.00 GiB of device memory, and it may have 0.95 GiB"
    assert standstill(scheduler)["for_s"] == 90
    assert scheduler.poll(room(memory_bytes=4 << 30)) is not None
    assert standstill(scheduler) is None


def test_without_any_memory_nothing_is_leased_not_even_pairs_to_score(scheduler):
    scheduler.enqueue(pairs(*"abcd"))
    scheduler.enqueue_scoring(pairs("s"))
    assert scheduler.poll(room(memory_bytes=0)) is None
    assert "it has no memory left for training" in standstill(scheduler)["reasons"][0]
    assert scheduler.poll(room(memory_bytes=1)) is not None


def test_every_executor_has_its_reason(scheduler, clock):
    scheduler.enqueue(pairs("a"))
    for name in ("gone", "pinned", "waits"):
        assert scheduler.poll(room(name, may_train=name != "pinned")) is None
        clock.now_s += 4
    assert standstill(scheduler)["reasons"] == [
        "gone: it has not asked for work for 12 s",
        "pinned: it has not asked for work for 8 s",
        f"waits: 1 of {BATCH} pairs, and none has waited {MAX_AGE_S:g} s",
    ]
    scheduler.poll(room("pinned", may_train=False))
    assert "pinned: v0001 is pinned" in standstill(scheduler)["reasons"]


def test_a_long_standstill_is_logged_once_with_its_reason(scheduler, clock, caplog):
    scheduler.enqueue(pairs(*"abcd"))
    for _ in range(40):
        scheduler.poll(room(may_train=False))
        clock.now_s += 4
    assert [record.message for record in caplog.records] == [
        "no work has been leased for 60 s: e1: v0001 is pinned"
    ]


def test_a_batch_goes_to_the_executor_with_the_memory_however_little_time_it_has(scheduler):
    """The one with the time lacks the memory: neither fits alone, and the batch would wait for ever."""
    scheduler.enqueue(pairs(*"abcd"))
    batch = scheduler.poll(room("roomy"))
    scheduler.complete(BatchOutcome(batch.task_id, "roomy", busy_s=5.0, peak_bytes=800_000))
    scheduler.poll(room("idle", memory_bytes=100_000, latency_s=HORIZON_S))
    scheduler.enqueue(pairs(*"efgh"))
    assert scheduler.poll(room("idle", memory_bytes=100_000, latency_s=HORIZON_S)) is None
    assert scheduler.poll(room("roomy", latency_s=0.1)) is not None
