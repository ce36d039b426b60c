import asyncio
import itertools
import json

import httpx
import pytest
from openai import AsyncOpenAI

from benchmarks.harness.client import HttpPort, Load, Request
from benchmarks.harness.feeder import BACKLOG_TASKS, FineTuneFeeder, random_pairs
from benchmarks.harness.window import WindowOptions, run_window
from core.errors import TrainingError
from simulator.trace import FineTune, TraceRequest
from tests.support.timed_engine import FakeEngine

LOAD = FineTune(prompt_tokens=3, completion_tokens=4)


def requests_at(*arrivals_s, tokens=3):
    return [TraceRequest(f"r{i}", arrival_s, 5, tokens, 1) for i, arrival_s in enumerate(arrivals_s)]


def measure(engine, requests, *, window_s=0.3, feeder=None, warm_up=(), drain_s=1.0, energy=None):
    options = WindowOptions(window_s, vocab_size=50, drain_s=drain_s, poll_s=0.05)
    return asyncio.run(run_window(engine, requests, options, feeder, warm_up, energy))


def feeder_of(engine, load=LOAD):
    return FineTuneFeeder(engine, load, pairs_per_step=2, vocab_size=50)


def about(seconds, expected_s):
    """Never shorter, for the fake engine sleeps; longer by what a busy machine adds."""
    return expected_s - 0.005 <= seconds <= expected_s + 0.25


def test_requests_are_sent_at_their_arrival_times_however_slow_the_engine_is():
    engine = FakeEngine(first_s=0.5)
    run = measure(engine, requests_at(0.0, 0.1, 0.2))
    sent = [at_s for _, at_s, _, _ in engine.seen]
    assert about(sent[1] - sent[0], 0.1 - 0.05)  # the first one may be sent a little late
    assert about(sent[2] - sent[0], 0.2 - 0.05)
    assert sent[2] - sent[0] < 0.5  # before any answer
    assert all(record.error is None for record in run.requests)


class SpyWatch:
    """Stands for an `EnergyWatch`."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def idle(self):
        self.calls.append(("idle", len(self.engine.seen)))

    def skip(self):
        self.calls.append(("skip", len(self.engine.seen)))

    def add(self, forward_s, slices_s):
        self.calls.append(("add", forward_s, slices_s))


def test_energy_is_watched_in_the_window_alone_and_idling_before_any_load():
    engine = FakeEngine()
    spy = SpyWatch(engine)
    run = measure(engine, requests_at(0.0, 0.1), warm_up=requests_at(0.0), energy=spy)
    kinds = [call[0] for call in spy.calls]
    assert kinds[:2] == ["idle", "skip"]
    assert set(kinds[2:]) == {"add"}
    assert spy.calls[0][1] == 0  # before the warm-up
    assert spy.calls[1][1] >= 1
    forward_s = sum(sample.forward_s for sample in run.samples if sample.shape.num_tokens)
    assert sum(call[1] for call in spy.calls[2:]) == pytest.approx(forward_s)


def test_first_token_and_gaps_are_what_the_engine_took():
    run = measure(FakeEngine(first_s=0.08, gap_s=0.04), requests_at(0.05, tokens=4))
    (record,) = run.requests
    assert about(record.ttft_s, 0.08)
    assert len(record.gaps_s) == 3
    assert all(about(gap_s, 0.04) for gap_s in record.gaps_s)
    assert record.ended_s == pytest.approx(record.first_token_s + sum(record.gaps_s))


def test_time_to_first_token_counts_the_wait_for_a_place():
    run = measure(FakeEngine(first_s=0.1, gap_s=0.0, slots=1), requests_at(0.0, 0.0, 0.0, tokens=1))
    ttfts = sorted(record.ttft_s for record in run.requests)
    assert all(about(ttft_s, 0.1 * place) for place, ttft_s in enumerate(ttfts, start=1))


def test_tokens_of_one_output_are_one_gap_and_zeros():
    run = measure(FakeEngine(gap_s=0.05, tokens_per_output=3), requests_at(0.0, tokens=7))
    (record,) = run.requests
    assert len(record.gaps_s) == 6
    assert [gap == 0.0 for gap in record.gaps_s] == [False, True, True, False, True, True]
    assert record.num_merged_tokens == 4


def test_a_failing_request_is_recorded_and_the_others_go_on():
    engine = FakeEngine()
    engine.fail_request = lambda request_id: ValueError("no room") if request_id.endswith("r0") else None
    failed, fine = measure(engine, requests_at(0.0, 0.1)).requests
    assert failed.error == "ValueError: no room"
    assert failed.first_token_s is not None
    assert not failed.succeeded
    assert fine.error is None


def test_a_request_that_ends_early_is_an_error():
    engine = FakeEngine()
    engine.fail_request = lambda _: "cut"
    (record,) = measure(engine, requests_at(0.0)).requests
    assert record.error == "RequestError: ended after 1 of 3 tokens"


def test_a_request_that_hangs_is_given_up_after_the_drain():
    (record,) = measure(FakeEngine(first_s=60), requests_at(0.0), window_s=0.1, drain_s=0.2).requests
    assert "not finished" in record.error
    assert record.ttft_s is None


def test_priority_reaches_the_engine_and_prompts_differ():
    engine = FakeEngine()
    measure(engine, requests_at(0.0, 0.0))
    (_, _, first, priority), (_, _, second, _) = engine.seen
    assert priority == 1
    assert len(first) == len(second) == 5
    assert first != second


def test_warm_up_requests_are_served_first_and_leave_no_record():
    engine = FakeEngine()
    run = measure(engine, requests_at(0.0), warm_up=requests_at(0.0, 0.05))
    assert [request_id for request_id, *_ in engine.seen] == ["warm-up-0-r0", "warm-up-0-r1", "window-r0"]
    assert len(run.requests) == 1


def test_the_backlog_never_empties_and_is_withdrawn_at_the_end():
    engine = FakeEngine(step_s=0.03)
    run = measure(engine, [], feeder=feeder_of(engine))
    assert engine.most_running_steps == BACKLOG_TASKS
    assert engine.running_steps == 0
    assert engine.aborted_steps == BACKLOG_TASKS
    ended = [task for task in run.tasks if 0 <= task.finished_s <= run.window_s]
    assert 4 <= len(ended) <= 20
    assert all(task.num_pairs == 2 and task.busy_s == 0.03 for task in ended)


def test_steps_of_the_warm_up_are_not_counted():
    engine = FakeEngine(step_s=0.03)
    run = measure(engine, [], feeder=feeder_of(engine), warm_up=requests_at(0.0, 0.6))
    assert len(run.tasks) < len(engine.samples) / 2  # the warm-up took twice as long as the window
    assert len(run.samples) < len(engine.samples) / 2


def test_the_warm_up_goes_on_until_a_policy_that_trains_seldom_has_trained():
    engine = FakeEngine(first_s=0.0, gap_s=0.0, steps_after=5)
    run = measure(engine, requests_at(0.0), feeder=feeder_of(engine), warm_up=requests_at(0.0, 0.01))
    ids = [request_id for request_id, *_ in engine.seen]
    assert ids[:6] == [f"warm-up-{round_}-r{number}" for round_ in range(3) for number in range(2)]
    assert len(set(ids)) == len(ids)
    assert run.requests[0].error is None


def test_an_engine_that_never_trains_is_reported():
    engine = FakeEngine(first_s=0.0, gap_s=0.0, steps_after=10**9)
    with pytest.raises(TrainingError, match="no fine-tune step"):
        measure(engine, [], feeder=feeder_of(engine), warm_up=requests_at(0.0), drain_s=0.02)


def test_training_at_a_rate_submits_a_step_for_every_so_many_pairs():
    engine = FakeEngine(step_s=0.2)
    run = measure(
        engine, [], feeder=feeder_of(engine, LOAD.model_copy(update={"pairs_per_s": 20.0})), window_s=0.5
    )
    assert 2 <= len(run.tasks) <= 6  # one every 0.1 s, each 0.2 s long, side by side
    assert engine.most_running_steps >= 2


def test_no_pairs_at_rate_zero():
    engine = FakeEngine()
    run = measure(engine, [], feeder=feeder_of(engine, LOAD.model_copy(update={"pairs_per_s": 0.0})))
    assert run.tasks == []


def test_an_engine_that_cannot_train_is_reported_before_the_window():
    engine = FakeEngine()
    engine.step_error = "UnsupportedModelError: no"
    with pytest.raises(TrainingError, match="UnsupportedModelError"):
        measure(engine, [], feeder=feeder_of(engine))


def test_forgotten_iterations_are_counted():
    engine = FakeEngine(step_s=0.005)
    engine.kept = 2
    run = measure(engine, [], feeder=feeder_of(engine))
    assert run.num_lost > 0
    assert run.covered_s >= 0.3


def test_pairs_of_the_pool_are_distinct_and_of_the_asked_lengths():
    pool = random_pairs(LOAD, 50, seed=0)
    assert len({pair.chosen_ids for pair in pool}) > len(pool) // 2
    assert {(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in pool} == {(3, 4, 4)}
    assert all(pair.chosen_ids != pair.rejected_ids for pair in pool)
    assert pool == random_pairs(LOAD, 50, seed=0)


# --- the load, on any port


class FakePort:
    """Answers `max_tokens` tokens after `delay_s`, and notes how many requests are under way."""

    def __init__(self, delay_s=0.02):
        self.delay_s = delay_s
        self.running = self.most_running = 0

    async def stream(self, request, record):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay_s)
            for _ in range(request.max_tokens):
                yield 1
        finally:
            self.running -= 1


def numbered():
    return (Request(f"r{number}", [1], max_tokens=2) for number in itertools.count())


def test_a_closed_loop_keeps_so_many_requests_under_way_until_it_is_stopped():
    async def play():
        load = Load(port := FakePort())
        looping = asyncio.create_task(load.closed_loop(numbered(), 3))
        await asyncio.sleep(0.1)
        load.stop()
        await looping
        return load, port

    load, port = asyncio.run(play())
    assert port.most_running == 3
    assert len(load.records) >= 6
    assert all(record.succeeded and record.num_tokens == 2 for record in load.records)


def test_requests_outlive_a_cancelled_loop_and_late_ones_fail_in_the_drain():
    async def play():
        load = Load(FakePort(delay_s=0.2))
        looping = asyncio.create_task(load.closed_loop(numbered(), 2))
        await asyncio.sleep(0.05)
        looping.cancel()
        load.send(Request("late", [1]))
        late = await load.drain(0.17)
        return load.records, late, await load.ask(Request("beside", [1], max_tokens=1))

    records, late, beside = asyncio.run(play())
    assert [record.succeeded for record in records] == [True, True, False]
    assert late == 1
    assert "not finished" in records[-1].error
    assert beside.succeeded
    assert beside.ttft_s >= 0.2


def chat_server(*chunks, status=200):
    lines = [
        f"data: {json.dumps({'id': 'c', 'object': 'chat.completion.chunk', **chunk})}\n\n" for chunk in chunks
    ]
    content = "".join([*lines, "data: [DONE]\n\n"])
    headers = {"content-type": "text/event-stream"}
    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=content, headers=headers))
    http = httpx.AsyncClient(transport=transport)
    return AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=http, max_retries=0)


def chunk(text, finish=None):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


@pytest.mark.parametrize(
    ("client", "text", "error"),
    [
        (chat_server(chunk("Pa"), chunk("ris"), chunk("", "stop")), "Paris", None),
        (chat_server(chunk("Pa")), "Pa", "RequestError: the stream ended without a finish_reason"),
        (chat_server(status=503), "", "InternalServerError: Error code: 503"),
    ],
)
def test_an_answer_over_http_is_whole_or_an_error(client, text, error):
    port = HttpPort(client, "m", {"store": False})
    record = asyncio.run(Load(port).ask(Request("r", [{"role": "user", "content": "Where?"}])))
    assert record.text == text
    assert record.succeeded is (error is None)
    assert record.num_tokens == (2 if text == "Paris" else len(text[:1]))
    if error:
        assert record.error.startswith(error)
