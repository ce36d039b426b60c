"""KV pruning inside the worker: drops rows before a forward pass, and scores blocks after it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from core.config import KvPruningConfig
from core.errors import ConfigError
from engine.pruning.block_stats import KeyStatistics
from engine.pruning.row_compaction import PrunedRows
from engine.pruning.scores import make_scorer

Scores = dict[str, tuple[list[int], torch.Tensor]]
"""By request id: positions of its full blocks in the block table's row, and their scores."""


class WorkerPruning:
    """What the worker does for `engine.pruning.pruner.KvPruner`, which decides."""

    def __init__(self, rows: PrunedRows, statistics: KeyStatistics, runner: Any, block_tokens: int) -> None:
        self._rows = rows
        self._statistics = statistics
        self._runner = runner
        self._block_tokens = block_tokens

    @classmethod
    def attach(cls, runner: Any, config: KvPruningConfig) -> "WorkerPruning":
        """Hook into a model runner whose KV cache is laid out; `kv_pruning.unsupported` has no objection to it.

        Raises:
            ConfigError: layers have different numbers of heads. vLLM then gives later ones a block table of their own
                (`update_block_table`), past the one that is closed up.
        """
        kv_cache = runner.kv_cache_config
        if len(runner.attn_groups[0]) > 1:
            raise ConfigError("kv_pruning.start must be off: the model's layers have different numbers of heads")
        group = kv_cache.kv_cache_groups[0]
        block_tokens = int(group.kv_cache_spec.block_size)
        context = runner.compilation_config.static_forward_context
        layers = [context[name] for name in group.layer_names]
        statistics = KeyStatistics(
            make_scorer(config.method), len(layers), int(kv_cache.num_blocks), block_tokens, runner.device
        )
        statistics.attach(layers)
        rows = PrunedRows(runner, block_tokens)
        rows.attach()
        return cls(rows, statistics, runner, block_tokens)

    def drop(self, blocks: Mapping[str, Sequence[int]]) -> None:
        """See `PrunedRows.drop`."""
        self._rows.drop(blocks)

    def score(self, request_ids: Sequence[str], num_scheduled_tokens: Mapping[str, int]) -> Scores:
        """Scores of the blocks that are full after the forward pass just run; unknown requests are left out."""
        scores: Scores = {}
        if not self._statistics.has_all_layers:
            return scores
        for request_id in request_ids:
            state = self._runner.requests.get(request_id)
            if state is None:
                continue
            computed = state.num_computed_tokens + num_scheduled_tokens.get(request_id, 0)
            ids = state.block_ids[0][: computed // self._block_tokens]
            positions = [position for position, block_id in enumerate(ids) if block_id]
            if positions:
                scores[request_id] = (positions, self._statistics.scores([ids[p] for p in positions]))
        return scores


def to_wire(scores: Scores) -> dict[str, list[tuple[int, float]]]:
    """Built-in types only; call it when the iteration's other outputs have arrived on the host."""
    return {
        request_id: list(zip(positions, values.tolist(), strict=True))
        for request_id, (positions, values) in scores.items()
    }
