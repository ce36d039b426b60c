"""What a waiting request will find in the prefix cache, against what vLLM then finds."""

import random

import pytest
import torch
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from engine.vllm.planning import PrefixLookup
from tests.support.kv_requests import BLOCK, NUM_BLOCKS, make, make_manager, run


@pytest.fixture
def manager():
    return make_manager()


def test_blocks_of_running_requests_are_held_and_those_of_ended_ones_cached(manager):
    running, _ = run(manager, "running", range(40))
    lookup = PrefixLookup(manager, BLOCK)
    waiting = make("waiting", [*range(22), *range(60, 76)])
    assert lookup(waiting) == (20, 20)
    assert lookup(make("same", range(40))) == (36, 36)  # of ten blocks vLLM takes nine, and computes one
    run(manager, "shorter", range(9))
    manager.free(running)
    assert lookup(waiting) == (20, 8)
    assert lookup(make("other", range(60, 90))) == (0, 0)


def test_it_finds_what_vllm_finds_while_prompts_come_and_go(manager):
    rng = random.Random(0)
    lookup = PrefixLookup(manager, BLOCK)
    running, num_hits = [], 0
    for number in range(400):
        family, length = rng.randrange(6), rng.randrange(1, 60)
        num_own = rng.randrange(length)
        prompt = [*range(1000 * family, 1000 * family + length - num_own), *[10_000 + number] * num_own]
        while running and manager.block_pool.get_num_free_blocks() < 20:
            manager.free(running.pop(rng.randrange(len(running))))
        cached, held = lookup(make(f"{number}", prompt))
        num_free = manager.block_pool.get_num_free_blocks()
        request, hit = run(manager, f"{number}", prompt)
        assert cached == hit
        taken = num_free - manager.block_pool.get_num_free_blocks()
        assert taken == -(-len(prompt) // BLOCK) - held // BLOCK
        running.append(request)
        num_hits += hit
    assert num_hits > NUM_BLOCKS


def test_nothing_is_said_where_the_answer_would_be_wrong():
    prompt = make("waiting", range(40))
    for manager in (
        make_manager(enable_caching=False),
        make_manager(
            SlidingWindowSpec(
                block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32, sliding_window=8
            )
        ),
    ):
        run(manager, "running", range(40))
        assert PrefixLookup(manager, BLOCK)(prompt) == (0, 0)
    manager = make_manager()
    run(manager, "running", range(40))
    prompt.skip_reading_prefix_cache = True  # prompt log-probabilities are wanted
    assert PrefixLookup(manager, BLOCK)(prompt) == (0, 0)
