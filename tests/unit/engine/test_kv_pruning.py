"""Which blocks are given up, on vLLM's own KV cache manager."""

import pytest

from core.config import KvPruningConfig
from engine.pruning.pruner import KvPruner
from tests.support.kv_requests import BLOCK, make_manager, run

CONFIG = KvPruningConfig(start="always", max_fraction=0.5, recent_tokens=8)


@pytest.fixture
def manager():
    return make_manager()


def make_pruner(manager):
    return KvPruner(CONFIG, manager, BLOCK, sink_tokens=4)


def grow(manager, request, num_tokens):
    for token in range(num_tokens):
        request.append_output_token_ids(token)
        assert manager.allocate_slots(request, 1) is not None
        request.num_computed_tokens += 1


def rows(values):
    return list(enumerate(values))


def positions_of_nulls(manager, request):
    blocks = manager.coordinator.single_type_managers[0].req_to_blocks[request.request_id]
    return [i for i, block in enumerate(blocks) if block.is_null]


def test_lowest_scores_go_first_and_sinks_and_the_recent_window_never(manager):
    request, _ = run(manager, "a", range(40))
    pruner, free = make_pruner(manager), manager.block_pool.get_num_free_blocks()
    assert pruner.to_score([request]) == ["a"]
    # Ten blocks: 0 is the sink, 8 and 9 are recent; all three score lowest.
    pruner.note_scores({"a": rows([-9, 5, 1, 4, 0, 3, 2, 6, -9, -9])}, {"a": request})
    offer = pruner.offer()
    assert offer.costs == [0.0, 0.1, 0.2, 0.3, 0.4]  # half of ten at most
    assert pruner.prune(3, {"a": request}) == {"a": [4, 2, 6]}
    assert positions_of_nulls(manager, request) == [2, 4, 6]
    assert manager.block_pool.get_num_free_blocks() == free + 3
    assert pruner.offer().costs == [0.3, 0.4]
    assert pruner.prune(99, {"a": request}) == {"a": [5, 3]}
    assert pruner.offer() is None
    assert (pruner.num_dropped, pruner.num_requests) == (5, 1)


def test_nothing_is_asked_for_before_the_prompt_is_computed_or_twice_for_the_same_blocks(manager):
    request, _ = run(manager, "a", range(40))
    pruner = make_pruner(manager)
    request.num_computed_tokens = 36
    assert pruner.to_score([request]) == []
    request.num_computed_tokens = 40
    assert pruner.to_score([request]) == ["a"]
    assert pruner.to_score([request]) == []
    grow(manager, request, BLOCK)
    assert pruner.to_score([request]) == ["a"]


def test_after_a_preemption_the_answer_so_far_is_computed_again_before_anything_is_dropped(manager):
    request, _ = run(manager, "a", range(40))
    grow(manager, request, 20)
    pruner = make_pruner(manager)
    request.num_computed_tokens = 48  # resumed, and 12 tokens of the answer are to come
    assert pruner.to_score([request]) == []
    request.num_computed_tokens = 59
    assert pruner.to_score([request]) == ["a"]


def test_tokens_in_flight_are_no_full_block(manager):
    request, _ = run(manager, "a", range(39))
    pruner = make_pruner(manager)
    request.num_computed_tokens, request.num_output_placeholders = 40, 1
    assert pruner.to_score([request]) == ["a"]
    pruner.note_scores({"a": rows([0.0] * 10)}, {"a": request})
    assert pruner.offer().num_blocks == 4  # half of nine


def test_opting_out_keeps_every_block(manager):
    out, _ = run(manager, "out", range(40), {"kv_pruning": False})
    zero, _ = run(manager, "zero", range(100, 140), {"kv_pruning": 0})
    kept, _ = run(manager, "in", range(50, 90), {"kv_pruning": True})
    assert make_pruner(manager).to_score([out, zero, kept]) == ["in"]


def test_blocks_that_others_share_and_prefix_hits_stay(manager):
    first, _ = run(manager, "first", range(40))
    second, num_hits = run(manager, "second", [*range(24), *range(60, 76)])
    assert num_hits == 24
    pruner = make_pruner(manager)
    pruner.note_prefix_hit("second", num_hits)
    requests = {"first": first, "second": second}
    assert pruner.to_score(requests.values()) == ["first", "second"]
    pruner.note_scores({name: rows([0.0] * 10) for name in requests}, requests)
    # Blocks 0 to 5 are shared; 8 and 9 are recent.
    assert pruner.prune(99, requests) == {"first": [6, 7], "second": [6, 7]}
    # A later request found the same prefix while it stood in the index: nothing of it goes, whoever holds it.
    third, _ = run(manager, "third", range(24))
    manager.free(first)
    pruner.note_prefix_hit("second", num_hits)
    assert pruner.prune(99, {"second": second}) == {}
    manager.free(third)
    grow(manager, second, BLOCK)
    assert pruner.to_score([second]) == ["second"]
    pruner.note_scores({"second": [(i, 0.0) for i in (0, 1, 2, 3, 4, 5, 8, 9, 10)]}, {"second": second})
    assert pruner.prune(99, {"second": second}) == {"second": [8]}


def test_a_block_that_found_a_second_reader_is_not_offered_any_more(manager):
    first, _ = run(manager, "first", range(40))
    pruner = make_pruner(manager)
    pruner.to_score([first])
    pruner.note_scores({"first": rows([0.0] * 10)}, {"first": first})
    assert pruner.offer().num_blocks == 5  # of 1 to 7, half of ten
    _, num_hits = run(manager, "second", [*range(12), *range(60, 70)])
    assert num_hits == 12
    assert pruner.offer().num_blocks == 3  # 1 and 2 have two readers
    assert pruner.prune(99, {"first": first}) == {"first": [3, 4, 5]}


def test_what_follows_the_first_dropped_block_leaves_the_prefix_index_and_never_enters_it(manager):
    request, _ = run(manager, "a", range(40))
    pruner = make_pruner(manager)
    pruner.to_score([request])
    pruner.note_scores({"a": rows([9, 9, 9, 0, 9, 1, 9, 9, 9, 9])}, {"a": request})
    pruner.prune(2, {"a": request})
    grow(manager, request, 3 * BLOCK)
    tokens = list(request.all_token_ids)
    manager.free(request)
    _, num_hits = run(manager, "again", tokens)
    assert num_hits == 3 * BLOCK


def test_a_preempted_request_starts_again(manager):
    request, _ = run(manager, "a", range(40))
    pruner, free = make_pruner(manager), manager.block_pool.get_num_free_blocks()
    for round_ in (1, 2):
        assert pruner.to_score([request]) == ["a"]
        pruner.note_scores({"a": rows([0.0] * 10)}, {"a": request})
        assert sum(map(len, pruner.prune(99, {"a": request}).values())) == 5
        assert pruner.num_requests == round_
        manager.free(request)
        pruner.forget("a", has_ended=False)
        assert manager.block_pool.get_num_free_blocks() == free + 10
        request.num_computed_tokens = 0
        assert manager.allocate_slots(request, 40) is not None
        request.num_computed_tokens = 40


def test_scores_that_come_too_late_are_no_harm(manager):
    request, _ = run(manager, "a", range(40))
    pruner = make_pruner(manager)
    pruner.to_score([request])
    manager.free(request)
    pruner.forget("a", has_ended=True)
    pruner.note_scores({"a": rows([0.0] * 10), "unknown": rows([1.0])}, {})
    assert pruner.offer() is None
    assert pruner.prune(5, {}) == {}
