"""Free heap memory goes back to the system, seldom and only if there is much of it."""

import sys

import psutil
import pytest
import torch

from engine.vllm.heap_trim import HeapTrimmer, HeapUse, heap_use

MIB = 1 << 20


def trimmed_at(use, times_s):
    """Of the times at which it is asked, those at which it trims."""
    now, trims = [0.0], []
    trimmer = HeapTrimmer(lambda: use, lambda: trims.append(now[0]), lambda: now[0])
    for now[0] in times_s:
        trimmer.tick()
    assert trimmer.num_trims == len(trims)
    return trims


def test_it_trims_once_a_minute_at_most():
    assert trimmed_at(HeapUse(600 * MIB, 300 * MIB), [1, 59, 61, 62, 120, 122, 500]) == [61, 122, 500]


@pytest.mark.parametrize("use", [None, HeapUse(0, 0), HeapUse(100 * MIB, 60 * MIB), HeapUse(600 * MIB, 140 * MIB)])
def test_it_leaves_a_little_free_memory_alone(use):
    assert trimmed_at(use, [61, 200]) == []


@pytest.mark.skipif(sys.platform != "linux" or heap_use() is None, reason="needs glibc")
def test_pages_of_holes_go_back_to_the_system():
    blocks = [
        torch.ones(32 * 1024, dtype=torch.uint8) for _ in range(8000)
    ]  # 250 MiB, below the size of own mappings
    blocks = blocks[::64]  # holes between the few that are left
    before, rss = heap_use(), psutil.Process().memory_info().rss
    assert before.free_bytes > 200 * MIB
    now = [0.0]
    trimmer = HeapTrimmer(clock=lambda: now[0])
    now[0] = 61.0
    trimmer.tick()
    assert trimmer.num_trims == 1
    assert psutil.Process().memory_info().rss < rss - 150 * MIB
    assert len(blocks) == 125
