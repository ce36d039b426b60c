"""Attention over what is left of a pruned request (worker side).

A dropped block is vLLM's null block (id 0) in the request's row of the block table: every later block keeps its place
in the row, so slots of new tokens are found as always, and keys need no new rotary positions. Attention kernels would
read the null block, so the metadata builders get a copy in which the rows are closed up and the lengths are shorter by
what was dropped. Causality holds: queries are the last tokens of a row, and all that was dropped lies before them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

_NULL_BLOCK = 0


class PrunedRows:
    """The rows with dropped blocks of one vLLM model runner (V1) with one group of full attention layers."""

    def __init__(self, runner: Any, block_tokens: int) -> None:
        self._runner = runner
        self._block_tokens = block_tokens
        self._pruned: set[str] = set()

    def attach(self) -> None:
        """Let vLLM's metadata builders see closed-up rows."""
        for group in self._runner.attn_groups[0]:
            group.build_metadata = _with_compaction(group.build_metadata, self)

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

    def compact(self, metadata: Any) -> Any:
        """vLLM's `CommonAttentionMetadata` without dropped blocks; the same object if there are none."""
        rows, kept, dropped = self._closed_up()
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

    def _closed_up(self) -> tuple[list[int], list[Any], list[int]]:
        """Of pruned requests in the batch: row numbers, block ids that are left, and how many are not."""
        rows, kept, dropped = [], [], []
        table, batch = self._table, self._runner.input_batch
        for request_id in list(self._pruned):
            if request_id not in self._runner.requests:
                self._pruned.discard(request_id)
                continue
            row = batch.req_id_to_index.get(request_id)
            if row is None:
                continue
            ids = table.block_table.np[row, : table.num_blocks_per_row[row]]
            left = ids[ids != _NULL_BLOCK]
            if len(left) == len(ids):  # preempted and computed anew
                self._pruned.discard(request_id)
                continue
            rows.append(row)
            kept.append(left)
            dropped.append(len(ids) - len(left))
        return rows, kept, dropped


def _with_compaction(build: Any, rows: PrunedRows) -> Any:
    def build_metadata(common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        return build(rows.compact(common_attn_metadata), *args, **kwargs)

    return build_metadata
