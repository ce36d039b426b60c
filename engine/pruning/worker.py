"""The worker side of KV pruning: keeps statistics of keys, scores blocks, and hides dropped blocks from attention.

Statistics: a hook on each layer's cache update adds every token's unit key to the statistic of its block, and a
block's first token clears what its former owner has left. A score then costs a few small gathers and no look at the
cache, whose layout is the backend's own. Blocks that come from the prefix cache keep the statistic of those who wrote
them. All shapes are fixed and nothing waits for the device, so the hook may run inside a captured graph.

Attention: a dropped block is vLLM's null block (id 0) in the request's row of the block table. Every later block keeps
its place in the row, so slots of new tokens are found as always, and keys need no new rotary positions. Attention
kernels would read the null block, so the metadata builders get a copy in which the rows are closed up and the lengths
are shorter by what was dropped. Causality holds: queries are the last tokens of a row, all that was dropped is before
them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

from core.errors import ConfigError
from engine.pruning.pruner import unsupported
from engine.pruning.scores import score_blocks, summarize

Scores = dict[str, tuple[list[int], torch.Tensor]]
"""Request id -> positions of its full blocks in the block table's row, and their scores."""

_NULL_BLOCK = 0


class KeyStatistics:
    """Running statistics per block and layer: `[num_blocks + 1, heads, head_size]` fp32; the last row is for pads."""

    def __init__(
        self, num_layers: int, num_blocks: int, block_tokens: int, key_shape: tuple[int, int], device: torch.device
    ) -> None:
        """`key_shape` is that of one token's key, heads and head size. All memory is taken here."""
        self._num_blocks = num_blocks
        self._block_tokens = block_tokens
        self._device = device
        self._stats = torch.zeros((num_layers, num_blocks + 1, *key_shape), dtype=torch.float32, device=device)
        self._written: set[int] = set()
        """Layers that have written keys."""

    @property
    def num_bytes(self) -> int:
        """Device memory of the statistics."""
        return self._stats.nbytes

    def attach(self, attention_layers: Sequence[Any]) -> None:
        """Hook into the cache update of vLLM's attention layers, in the order of the model."""
        for i, layer in enumerate(attention_layers):
            layer.impl.do_kv_cache_update = _with_statistics(layer.impl.do_kv_cache_update, self, i)

    def add(self, layer: int, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Take in keys that are being written.

        `keys` are [T, heads, head_size], rotary positions applied; rows beyond `slots` are padding. `slots` are
        int64 [T'], block * block_tokens + offset; negative for padding.
        """
        keys, stats = keys[: slots.shape[0]], self._stats[layer]
        self._written.add(layer)
        blocks = torch.where(slots >= 0, slots // self._block_tokens, self._num_blocks)
        first = torch.where(slots % self._block_tokens == 0, blocks, self._num_blocks)
        stats.index_fill_(0, first, 0.0)
        stats.index_add_(0, blocks, summarize(keys.unsqueeze(1)))

    def scores(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Scores [m] fp32 on the host (on CUDA: on its way there) of one request's full blocks; higher is kept."""
        index = torch.tensor(block_ids, dtype=torch.int64).to(self._device, non_blocking=True)
        scores = score_blocks(self._stats[:, index], len(block_ids) * self._block_tokens)
        if scores.device.type == "cpu":
            return scores
        host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
        return host.copy_(scores, non_blocking=True)

    @property
    def has_all_layers(self) -> bool:
        """Every layer has written something, so there are scores."""
        return len(self._written) == len(self._stats)


class WorkerPruning:
    """Does for one vLLM model runner (V1) what `engine.pruning.pruner.KvPruner` decides."""

    def __init__(self, runner: Any) -> None:
        """Hook into a runner whose KV cache is laid out; `pruner.unsupported` has no objection to it.

        Raises:
            ConfigError: layers have different numbers of heads. vLLM then gives later ones a block table of their own
                (`update_block_table`), past the one that is closed up.
        """
        if len(runner.attn_groups[0]) > 1:
            raise ConfigError("kv_pruning.start must be off: the model's layers have different numbers of heads")
        group = runner.kv_cache_config.kv_cache_groups[0]
        self._runner = runner
        self._block_tokens = int(group.kv_cache_spec.block_size)
        self._pruned: set[str] = set()
        context = runner.compilation_config.static_forward_context
        layers = [context[name] for name in group.layer_names]
        num_blocks = int(runner.kv_cache_config.num_blocks)
        shape = (int(group.kv_cache_spec.num_kv_heads), int(group.kv_cache_spec.head_size))
        self._statistics = KeyStatistics(len(layers), num_blocks, self._block_tokens, shape, runner.device)
        self._statistics.attach(layers)
        for attention in runner.attn_groups[0]:
            attention.build_metadata = _with_closed_rows(attention.build_metadata, self)

    @property
    def statistics_bytes(self) -> int:
        """Device memory that is taken beside the KV cache."""
        return self._statistics.num_bytes

    def drop(self, blocks: Mapping[str, Sequence[int]]) -> None:
        """Put the null block in place of blocks, given as positions in the row by request; before the forward pass.

        Requests that the runner does not know any more are ignored.
        """
        copied = getattr(self._runner, "prepare_inputs_event", None)
        if blocks and copied is not None:
            copied.synchronize()  # the forward pass in flight may still copy the table to the device
        for request_id, positions in blocks.items():
            state = self._runner.requests.get(request_id)
            if state is None:
                continue
            row = self._runner.input_batch.req_id_to_index.get(request_id)
            for position in positions:
                state.block_ids[0][position] = _NULL_BLOCK
            if row is not None:
                self._table.block_table.np[row, list(positions)] = _NULL_BLOCK
            self._pruned.add(request_id)

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

    def close_rows(self, metadata: Any) -> Any:
        """vLLM's `CommonAttentionMetadata` without dropped blocks; the same object if there are none."""
        rows, kept, dropped = self._closed_rows()
        if not rows:
            return metadata
        table, seq_lens = metadata.block_table_tensor.clone(), metadata.seq_lens.clone()
        index = torch.tensor(rows).to(table.device, non_blocking=True)
        width = max(len(ids) for ids in kept)
        host = torch.zeros((len(rows), width), dtype=table.dtype)
        for i, ids in enumerate(kept):
            host[i, : len(ids)] = torch.as_tensor(ids)
        table[index, :width] = host.to(table.device, non_blocking=True)
        shorter = torch.tensor(dropped, dtype=seq_lens.dtype) * self._block_tokens
        seq_lens[index] -= shorter.to(seq_lens.device, non_blocking=True)
        return replace(metadata, block_table_tensor=table, seq_lens=seq_lens, _num_computed_tokens_cache=None)

    @property
    def _table(self) -> Any:
        return self._runner.input_batch.block_table[0]

    def _closed_rows(self) -> tuple[list[int], list[Any], list[int]]:
        """Pruned requests in the batch: row numbers, block ids that are left, and how many are not."""
        rows, kept, dropped = [], [], []
        for request_id in list(self._pruned):
            if request_id not in self._runner.requests:
                self._pruned.discard(request_id)
                continue
            row = self._runner.input_batch.req_id_to_index.get(request_id)
            if row is None:
                continue
            ids = self._table.block_table.np[row, : self._table.num_blocks_per_row[row]]
            left = ids[ids != _NULL_BLOCK]
            if len(left) == len(ids):  # preempted and computed anew
                self._pruned.discard(request_id)
                continue
            rows.append(row)
            kept.append(left)
            dropped.append(len(ids) - len(left))
        return rows, kept, dropped


def statistics_share(vllm_config: Any, kv_cache_specs: dict[str, Any]) -> float:
    """Share of a KV cache's memory to leave to the statistics of its blocks; 0 if this model cannot be pruned.

    `kv_cache_specs` are the layers' by name. The share is a sixteenth of the cache with blocks of 16 tokens in 16 bits.
    """
    groups = get_kv_cache_groups(vllm_config, dict(kv_cache_specs))
    if unsupported(vllm_config, SimpleNamespace(kv_cache_groups=groups)) is not None:
        return 0.0
    spec = groups[0].kv_cache_spec
    statistics = spec.num_kv_heads * spec.head_size * torch.float32.itemsize
    return float(statistics / (spec.page_size_bytes + statistics))


def to_wire(scores: Scores) -> dict[str, list[tuple[int, float]]]:
    """Built-in types only; call it when the iteration's other outputs have arrived on the host."""
    return {
        request_id: list(zip(positions, values.tolist(), strict=True))
        for request_id, (positions, values) in scores.items()
    }


def _with_statistics(update: Any, statistics: KeyStatistics, layer: int) -> Any:
    def do_kv_cache_update(owner: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        statistics.add(layer, key, slot_mapping)
        update(owner, key, value, kv_cache, slot_mapping)

    return do_kv_cache_update


def _with_closed_rows(build: Any, pruning: WorkerPruning) -> Any:
    def build_metadata(common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        return build(pruning.close_rows(common_attn_metadata), *args, **kwargs)

    return build_metadata
