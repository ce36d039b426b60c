"""The planner's view of vLLM's own request objects and queue."""

import pytest
from vllm import SamplingParams
from vllm.v1.request import Request

from core.config import ExperimentsConfig
from core.types import FineTuneTask, SliceReport, SliceTiming, TaskKind, TokenizedPair
from engine.vllm.planning import KvPool, shape_of, view_of
from engine.vllm.task_table import TaskTable
from engine.vllm.waiting_queue import AgeingRequestQueue
from scheduler.priority import BASE_PREFILL, BASE_PREFILL_BACKGROUND, RATE_PREFILL_BACKGROUND
from scheduler.view import MAX_PREFILLS_SEEN


def request(name, num_prompt, *, computed=0, arrived_s=0.0, priority=0, output=0):
    made = Request(
        request_id=name,
        prompt_token_ids=list(range(num_prompt)),
        sampling_params=SamplingParams(max_tokens=100),
        pooling_params=None,
        arrival_time=arrived_s,
        priority=priority,
    )
    for token in range(output):
        made.append_output_token_ids(token)
    made.num_computed_tokens = computed
    return made


@pytest.fixture
def waiting():
    return AgeingRequestQueue(ExperimentsConfig())


def look(running, waiting, now_s=10.0, **kwargs):
    """With three free seats."""
    waiting.now_s = now_s
    pool = KvPool(100, 7, 16)
    return view_of(now_s, running, waiting, free_seats=3, pool=pool, free_kv_blocks=99, finetune=None, **kwargs)


def test_requests_with_one_token_to_compute_decode_and_others_prefill(waiting):
    decoding = request("d", 20, computed=24, output=5)
    half_way = request("p", 100, computed=60)
    waiting.add_request(request("w", 30, arrived_s=9.0, priority=1))
    view = look([decoding, half_way], waiting)
    assert (view.num_decode, view.decode_context, view.free_seats) == (1, 24, 3)
    assert [(p.request_id, p.num_tokens, p.context_tokens, p.is_running) for p in view.prefills] == [
        ("p", 40, 60, True),
        ("w", 30, 0, False),
    ]
    assert view.prefills[1].user_priority == 1


def test_of_a_waiting_request_only_what_is_not_cached_is_to_be_computed(waiting):
    for number in range(5):
        waiting.add_request(request(f"w{number}", 100 + number, arrived_s=number))
    view = look([], waiting, cached_prefix_of=lambda asked: (32, 16) if asked.request_id != "w0" else (0, 0))
    found = [(p.num_tokens, p.context_tokens, p.kept_tokens, p.revived_tokens) for p in view.prefills]
    assert found == [(100, 0, 0, 0), (69, 32, 16, 16), (70, 32, 16, 16), (103, 0, 0, 0), (104, 0, 0, 0)]


def test_a_resumed_request_prefills_its_output_again(waiting):
    preempted = request("r", 20, computed=0, output=10)
    view = look([preempted], waiting)
    assert (view.num_decode, view.prefills[0].num_tokens) == (0, 30)


def test_a_long_queue_is_seen_by_its_head_and_counted_by_its_length(waiting):
    for number in range(100):
        waiting.add_request(request(f"w{number}", 10, arrived_s=float(number)))
    view = look([], waiting)
    assert [p.request_id for p in view.prefills] == [f"w{n}" for n in range(MAX_PREFILLS_SEEN)]
    assert view.num_waiting_unseen == 100 - MAX_PREFILLS_SEEN
    assert view.unseen_tokens == 10 * view.num_waiting_unseen
    assert view.oldest_unseen_s == 0.0


def test_the_shape_of_what_was_scheduled():
    requests = {
        "d": request("d", 20, computed=25, output=5),  # vLLM has counted the scheduled tokens already
        "p": request("p", 100, computed=64),
    }
    shape = shape_of({"d": 1, "p": 60}, requests)
    assert (shape.num_decode, shape.decode_context) == (1, 24)
    assert (shape.num_prefill_tokens, shape.prefill_attention, shape.num_prefills) == (60, 60 * (4 + 30), 1)


def test_the_queue_keeps_its_order_between_looking_and_taking(waiting):
    overtakes_s = (BASE_PREFILL - BASE_PREFILL_BACKGROUND + 1) / RATE_PREFILL_BACKGROUND
    old, fresh = request("old", 5, priority=1), request("fresh", 5, arrived_s=overtakes_s - 20)
    waiting.prepend_requests([old, fresh])
    waiting.now_s = overtakes_s - 19
    assert waiting.peek_request() is fresh
    assert list(waiting) == [fresh, old]
    assert waiting.pop_request() is fresh
    waiting.remove_requests([old])
    assert not waiting
    assert len(waiting) == 0


def test_tokens_of_dropped_blocks_are_no_context(waiting):
    decoding = request("d", 20, computed=24, output=5)
    view = look([decoding], waiting, num_absent_tokens=16)
    assert (view.num_decode, view.decode_context) == (1, 8)
    assert shape_of({"d": 1}, {"d": decoding}, 16).decode_context == 23 - 16


def pair(name, prompt, chosen, rejected):
    return TokenizedPair(name, tuple(range(prompt)), tuple(range(chosen)), tuple(range(rejected)))


def test_the_task_table_tells_what_is_in_front_and_since_when():
    table = TaskTable()
    assert table.state(4.0) is None
    task = FineTuneTask("t", TaskKind.TRAIN, (pair("a", 4, 2, 3), pair("b", 1, 9, 1)), dpo_loss=0.4, attempts=1)
    table.add(request("t", 1), task.to_wire(), now_s=5.0)
    table.add(request("u", 1), FineTuneTask("u", TaskKind.EVALUATE, ()).to_wire(), now_s=6.0)
    state = table.state(7.0)
    assert (state.last_progress_s, state.dpo_loss, state.attempts) == (5.0, 0.4, 1)
    assert state.max_batch_tokens == 1 + 8 + 0
    table.note_progress(SliceReport(slices=[SliceTiming("embed", 1, 0.1)], held_bytes=64), now_s=8.0)
    table.note_progress(SliceReport(held_bytes=64), now_s=9.0)
    assert (table.state(9.0).last_progress_s, table.state(9.0).held_bytes) == (8.0, 64)
    assert table.pop("t").num_pairs == 2
    assert table.pop("t") is None
    assert [r.request_id for r in table.remove(None)] == ["u"]
    assert not table


def test_a_clock_that_was_set_back_does_not_stop_ageing():
    table = TaskTable()
    table.add(request("t", 1), FineTuneTask("t", TaskKind.TRAIN, ()).to_wire(), now_s=5000.0)
    table.note_progress(SliceReport(slices=[SliceTiming("embed", 1, 0.1)]), now_s=5001.0)
    assert table.state(1000.0).last_progress_s == 1000.0
    assert table.state(1010.0).last_progress_s == 1000.0


def test_a_task_that_only_scores_is_told_apart():
    table = TaskTable()
    table.add(request("t", 1), FineTuneTask("t", TaskKind.EVALUATE, ()).to_wire(), now_s=0.0)
    assert not table.state(1.0).is_training


def test_a_decode_with_draft_tokens_is_a_decode_of_several_tokens(waiting):
    drafting = request("d", 20, computed=24, output=5)
    drafting.spec_token_ids = [1, 2, 3]
    view = look([drafting], waiting)
    assert (view.num_decode, view.decode_tokens, view.prefills) == (1, 4, [])
    drafting.num_computed_tokens += 4  # as vLLM leaves it when it has scheduled them
    assert shape_of({"d": 4}, {"d": drafting}).num_decode == 4
