"""KeyDiff scores of KV blocks (arXiv 2504.15364): blocks whose keys are most like all others are missed the least.

A token scores minus the cosine between its key and the anchor, the mean of all unit keys of the request (per head). A
block scores the mean over its tokens, key-value heads and layers. Keys are those in the cache, with rotary positions
applied, as in kvpress (`keydiff_press.py`), which gives the same numbers.

The statistic of a block is the sum of its unit keys, so it is built up token by token and keys are never read again:
the anchor is the sum of the statistics, and a block's score is minus the product of its statistic with the anchor.
"""

from collections.abc import Container, Sequence

import torch
from torch import Tensor


def summarize(keys: Tensor) -> Tensor:
    """Statistics of n full blocks of one layer: `[n, block_tokens, heads, head_size]` -> `[n, heads, head_size]` fp32.

    They add up over tokens: the statistic of a block is the sum of those of blocks of one token each.
    """
    return torch.nn.functional.normalize(keys.float(), dim=-1).sum(dim=1)


def score_blocks(stats: Tensor, num_tokens: int) -> Tensor:
    """Score the m full blocks of one request, in order: `[layers, m, heads, head_size]` -> `[m]` fp32, higher is kept.

    ValueError: `num_tokens`, those that the blocks hold, do not fill them; an unfinished last block takes no part.
    """
    num_blocks = stats.shape[1]
    if num_blocks == 0 or num_tokens <= 0 or num_tokens % num_blocks:
        raise ValueError(f"{num_tokens} tokens do not fill {num_blocks} blocks")
    # The anchor's length does not matter to a cosine, so the sum over blocks does for the mean over tokens.
    anchor = torch.nn.functional.normalize(stats.sum(dim=1, keepdim=True), dim=-1)
    return -(stats * anchor).sum(dim=-1).mean(dim=(0, 2)) / (num_tokens // num_blocks)


def choose_blocks(scores: Sequence[float], count: int, protected: Container[int] = ()) -> list[int]:
    """Indices of up to `count` blocks to drop, lowest score first, ties by index; never one of `protected`."""
    free = [index for index in range(len(scores)) if index not in protected]
    return sorted(free, key=lambda index: (scores[index], index))[: max(count, 0)]
