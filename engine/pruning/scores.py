"""Which KV blocks attention will hardly miss, judged by their keys alone.

Two methods behind one interface. Both keep one small statistic per block and layer, a sum over the block's tokens, so
that it may be built up token by token; the score of every block of a request follows from the statistics, without
reading the keys again.

* KeyDiff (arXiv 2504.15364): drop the keys most like the others. A token scores minus the cosine between its key and
  the anchor, the mean of all unit keys of the request (per head). The statistic of a block is the sum of its unit
  keys: the anchor is the sum over blocks, and the mean score of a block's tokens is minus its product with the anchor.
* Key norm (arXiv 2406.11430): keys of small norm get high attention. A token scores minus the norm of its key.

A block's score is the mean over its tokens, the key-value heads and the layers. Keys are those in the cache, that
is with rotary positions applied, as in kvpress (`keydiff_press.py`, `knorm_press.py`), which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

import torch
from torch import Tensor

from core.errors import ConfigError


class BlockScorer(Protocol):
    """One way of scoring the KV blocks of a request; higher scores are kept."""

    def stat_shape(self, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """Shape of the statistic of one block in one layer."""

    def summarize(self, keys: Tensor) -> Tensor:
        """Statistics `[n, *stat_shape]` in fp32 of n full blocks of one layer.

        They add up over tokens: the statistic of a block is the sum of those of blocks of one token each.

        `keys` is `[n, block_tokens, num_kv_heads, head_size]`, of any floating dtype.
        """

    def score(self, stats: Tensor, num_tokens: int) -> Tensor:
        """Scores `[m]` in fp32 of the m blocks of one request, in order; higher = keep.

        `stats` is `[layers, m, *stat_shape]`; `num_tokens` is what these m blocks hold, all of them full: an
        unfinished last block takes no part. Raises ValueError if that cannot be.
        """


class KeyDiffScorer:
    """Minus the cosine to the mean direction of the request's keys."""

    def stat_shape(self, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """The sum of the block's unit keys, per head."""
        return (num_kv_heads, head_size)

    def summarize(self, keys: Tensor) -> Tensor:
        """Sums of unit keys, `[n, num_kv_heads, head_size]`."""
        return torch.nn.functional.normalize(keys.float(), dim=-1).sum(dim=1)

    def score(self, stats: Tensor, num_tokens: int) -> Tensor:
        """Mean over tokens, heads and layers of minus the cosine to the anchor."""
        block_tokens = _block_tokens(stats, num_tokens)
        # The anchor's length does not matter to a cosine, so the sum over blocks does for the mean over tokens.
        anchor = torch.nn.functional.normalize(stats.sum(dim=1, keepdim=True), dim=-1)
        return -(stats * anchor).sum(dim=-1).mean(dim=(0, 2)) / block_tokens


class KeyNormScorer:
    """Minus the norm of the keys."""

    def stat_shape(self, num_kv_heads: int, head_size: int) -> tuple[int, ...]:  # noqa: ARG002
        """The sum of the norms of the block's keys, per head."""
        return (num_kv_heads,)

    def summarize(self, keys: Tensor) -> Tensor:
        """Sums of norms, `[n, num_kv_heads]`."""
        return keys.float().norm(dim=-1).sum(dim=1)

    def score(self, stats: Tensor, num_tokens: int) -> Tensor:
        """Mean over tokens, heads and layers of minus the norm."""
        block_tokens = _block_tokens(stats, num_tokens)
        return -stats.mean(dim=(0, 2)) / block_tokens


def make_scorer(method: str) -> BlockScorer:
    """The scorer of `kv_pruning.method`; ConfigError if there is none of that name."""
    scorers: dict[str, type[BlockScorer]] = {"keydiff": KeyDiffScorer, "key_norm": KeyNormScorer}
    if method not in scorers:
        raise ConfigError(f"kv_pruning.method: {method!r} is unknown; there are {', '.join(sorted(scorers))}")
    return scorers[method]()


def choose_blocks(scores: Sequence[float], count: int, protected: Container[int] = ()) -> list[int]:
    """Indices of up to `count` blocks to drop, lowest score first, ties by index; never one of `protected`."""
    free = [index for index in range(len(scores)) if index not in protected]
    return sorted(free, key=lambda index: (scores[index], index))[: max(count, 0)]


def _block_tokens(stats: Tensor, num_tokens: int) -> int:
    num_blocks = stats.shape[1]
    if num_blocks == 0 or num_tokens <= 0 or num_tokens % num_blocks:
        raise ValueError(f"{num_tokens} tokens do not fill {num_blocks} blocks")
    return num_tokens // num_blocks
