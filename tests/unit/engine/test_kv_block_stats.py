"""Running statistics of keys equal those of the finished blocks."""

from types import SimpleNamespace

import pytest
import torch

from engine.pruning.scores import score_blocks, summarize
from engine.pruning.worker import KeyStatistics

BLOCK, HEADS, SIZE = 4, 2, 8


def slots(block_ids, start, count):
    """Where tokens `start`.. of a request with these blocks are written."""
    return torch.tensor([block_ids[t // BLOCK] * BLOCK + t % BLOCK for t in range(start, start + count)])


def test_written_in_chunks_or_at_once_the_scores_are_those_of_whole_blocks():
    statistics = KeyStatistics(2, 16, BLOCK, (HEADS, SIZE), torch.device("cpu"))
    keys = torch.randn(2, 5 * BLOCK, HEADS, SIZE, generator=torch.Generator().manual_seed(0))
    block_ids = [7, 3, 12, 1, 9]
    for layer in range(2):
        for start, count in ((0, 6), (6, 1), (7, 9), (16, 4)):
            statistics.add(layer, keys[layer, start : start + count], slots(block_ids, start, count))
    whole = torch.stack([summarize(keys[layer].view(5, BLOCK, HEADS, SIZE)) for layer in range(2)])
    assert statistics.scores(block_ids) == pytest.approx(score_blocks(whole, 5 * BLOCK), abs=1e-5)


def test_a_new_owner_of_a_block_starts_from_nothing_and_padding_is_ignored():
    statistics = KeyStatistics(1, 16, BLOCK, (HEADS, SIZE), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 2 * BLOCK, HEADS, SIZE, generator=generator)
    statistics.add(0, old, slots([2, 5], 0, 2 * BLOCK))
    padded = torch.cat([new, torch.full((3, HEADS, SIZE), torch.nan)])
    statistics.add(0, padded, torch.cat([slots([2, 5], 0, 2 * BLOCK), torch.full((1,), -1)]))
    fresh = KeyStatistics(1, 16, BLOCK, (HEADS, SIZE), torch.device("cpu"))
    fresh.add(0, new, slots([2, 5], 0, 2 * BLOCK))
    assert statistics.scores([2, 5]) == pytest.approx(fresh.scores([2, 5]))


def test_the_hook_leaves_the_cache_update_as_it_is():
    seen = []
    layer = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=lambda *arguments: seen.append(arguments)))
    statistics = KeyStatistics(1, 4, BLOCK, (HEADS, SIZE), torch.device("cpu"))
    statistics.attach([layer])
    assert not statistics.has_all_layers
    key, where = torch.ones(BLOCK, HEADS, SIZE), slots([1], 0, BLOCK)
    layer.impl.do_kv_cache_update("owner", key, "value", "cache", where)
    assert seen == [("owner", key, "value", "cache", where)]
    assert statistics.has_all_layers
    assert statistics.scores([1]).tolist() == pytest.approx([-1.0])
