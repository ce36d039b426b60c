"""Statistics of the keys in every KV block, kept while vLLM writes them, and the scores that follow (worker side).

A hook on each layer's cache update adds every token's statistic (`engine.pruning.scores`) to that of its block; a
block's
first token clears what its former owner has left. So a score costs a few small gathers and no look at the cache,
whose layout is the backend's own. Blocks that come from the prefix cache keep the statistic of those who wrote them.

All shapes are fixed and nothing waits for the device, so the hook may run inside a captured graph.
"""

from collections.abc import Sequence
from typing import Any

import torch

from engine.pruning.scores import BlockScorer


class KeyStatistics:
    """Running statistics per block and layer: `[num_blocks + 1, *stat_shape]` fp32 each; the last row is for pads."""

    def __init__(
        self, scorer: BlockScorer, num_layers: int, num_blocks: int, block_tokens: int, device: torch.device
    ) -> None:
        self._scorer = scorer
        self._num_layers = num_layers
        self._num_blocks = num_blocks
        self._block_tokens = block_tokens
        self._device = device
        self._stats: dict[int, torch.Tensor] = {}

    def attach(self, attention_layers: Sequence[Any]) -> None:
        """Hook into the cache update of vLLM's attention layers, in the order of the model."""
        for i, layer in enumerate(attention_layers):
            layer.impl.do_kv_cache_update = _with_statistics(layer.impl.do_kv_cache_update, self, i)

    def add(self, layer: int, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Take in keys that are being written.

        Args:
            layer: number of the layer.
            keys: [T, heads, head_size], rotary positions applied; rows beyond `slots` are padding.
            slots: int64 [T'], block * block_tokens + offset; negative for padding.
        """
        keys = keys[: slots.shape[0]]
        stats = self._stats.get(layer)
        if stats is None:
            shape = self._scorer.stat_shape(keys.shape[1], keys.shape[2])
            stats = self._stats[layer] = torch.zeros(
                (self._num_blocks + 1, *shape), dtype=torch.float32, device=self._device
            )
        blocks = torch.where(slots >= 0, slots // self._block_tokens, self._num_blocks)
        first = torch.where(slots % self._block_tokens == 0, blocks, self._num_blocks)
        stats.index_fill_(0, first, 0.0)
        stats.index_add_(0, blocks, self._scorer.summarize(keys.unsqueeze(1)))

    def scores(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Scores [m] fp32 on the host (on CUDA: on its way there) of one request's full blocks; higher is kept."""
        index = torch.tensor(block_ids, dtype=torch.int64).to(self._device, non_blocking=True)
        stats = torch.stack([self._stats[layer][index] for layer in range(self._num_layers)])
        scores = self._scorer.score(stats, len(block_ids) * self._block_tokens)
        if scores.device.type == "cpu":
            return scores
        host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
        return host.copy_(scores, non_blocking=True)

    @property
    def has_all_layers(self) -> bool:
        """Every layer has written something, so there are scores."""
        return len(self._stats) == self._num_layers

    @property
    def num_bytes(self) -> int:
        """Device memory of the statistics."""
        return sum(stats.nbytes for stats in self._stats.values())


def _with_statistics(update: Any, statistics: KeyStatistics, layer: int) -> Any:
    def do_kv_cache_update(owner: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        statistics.add(layer, key, slot_mapping)
        update(owner, key, value, kv_cache, slot_mapping)

    return do_kv_cache_update
