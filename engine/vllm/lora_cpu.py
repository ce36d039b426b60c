"""LoRA on the CPU, computed by version instead of by token.

vLLM's CPU path (`PunicaWrapperCPU`) gathers the matrices of an adapter once for every token, which for one adapter in
a batch of eight tokens copies its weights eight times, in each of the seven linear layers. Here the tokens of a batch
are grouped by version when the batch is composed, and each group costs two matrix products per fused layer, whatever
the number of tokens; a batch without adapters costs nothing. The rows of a base request stay as they are (vLLM adds
the adapter of the last slot to them if other rows of the batch have an adapter: its index of "none" is -1).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_FEW_ROWS = 16
"""Up to here products in fp32 are faster than in half precision, whose kernels take longer to start than to run
(docs/measurements/lora-cpu.md)."""

Rows = slice | torch.Tensor | None
"""Rows of a batch; None stands for all."""


class Slices(tuple[torch.Tensor, ...]):
    """A layer's `lora_a_stacked` or `lora_b_stacked`, as vLLM has it: one `[slots, 1, rows, columns]` for each slice.

    The tensors are views of one fp32 buffer, so what vLLM writes to a slot is there in fused form at once.
    """

    by_slot: list[torch.Tensor]
    """The fused matrix of each slot, ready to be the right side of a product: `[inputs, slices * rank]` for A, and
    block-diagonal `[slices * rank, outputs]` for B."""


class GroupedLora(PunicaWrapperCPU):
    """vLLM's wrapper with `add_lora_linear` by groups. All else is vLLM's, such as adapters of the head."""

    _groups: Sequence[tuple[int, Rows]] = ()
    _num_rows = 0

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take the composition of the next batches; vLLM calls it when that changes, not for every layer."""
        super().update_metadata(*args, **kwargs)
        slots = self.token_lora_indices.numpy()
        self._num_rows = len(slots)
        self._groups = [(int(slot), _rows_of(slots == slot)) for slot in np.unique(slots) if slot >= 0]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Add to `y` `[rows, outputs]` what the adapters of the rows make of `x` `[rows, inputs]`, times `scale`."""
        if not isinstance(lora_a_stacked, Slices) or not isinstance(lora_b_stacked, Slices):
            return super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
        if not self._groups:
            return None
        if kwargs or len(x) != self._num_rows:
            return super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
        for slot, rows in self._groups:
            a, b = lora_a_stacked.by_slot[slot], lora_b_stacked.by_slot[slot]
            if rows is None:
                _add_product(y, x, a, b, scale)
            elif isinstance(rows, slice):
                _add_product(y[rows], x[rows], a, b, scale)
            else:
                part = y[rows]
                _add_product(part, x[rows], a, b, scale)
                y[rows] = part
        return None


def group_by_version(manager: Any, max_num_batched_tokens: int, device: torch.device) -> None:
    """Let the layers of a `LoRAModelManager` compute by version. What their slots hold stays."""
    grouped = GroupedLora(
        max_num_batched_tokens, max_batches=manager.max_num_seqs, device=device, lora_config=manager.lora_config
    )
    for name in manager.punica_wrapper_mapping:
        manager.punica_wrapper_mapping[name] = grouped
    for layer in manager.modules.values():
        layer.set_mapping(grouped)
        if isinstance(layer, BaseLinearLayerWithLoRA):
            layer.lora_a_stacked, layer.lora_b_stacked = fuse(layer.lora_a_stacked, layer.lora_b_stacked)


def fuse(a_slices: Sequence[torch.Tensor], b_slices: Sequence[torch.Tensor]) -> tuple[Slices, Slices]:
    """The same matrices in fused buffers: A `[slots, 1, rank, inputs]` and B `[slots, 1, outputs, rank]` per slice."""
    slots, rank = len(a_slices[0]), a_slices[0].shape[2]
    ends = np.cumsum([one.shape[2] for one in b_slices]).tolist()
    a = torch.zeros(slots, 1, len(a_slices) * rank, a_slices[0].shape[3], dtype=torch.float32)
    b = torch.zeros(slots, 1, ends[-1], len(a_slices) * rank, dtype=torch.float32)
    ranks = [slice(index * rank, (index + 1) * rank) for index in range(len(a_slices))]
    outputs = [slice(end - one.shape[2], end) for end, one in zip(ends, b_slices, strict=True)]
    fused_a = Slices(a[:, :, rows] for rows in ranks)
    fused_b = Slices(b[:, :, rows, columns] for rows, columns in zip(outputs, ranks, strict=True))
    for fused, slices, whole in ((fused_a, a_slices, a), (fused_b, b_slices, b)):
        fused.by_slot = [matrix.t() for matrix in whole[:, 0]]
        for target, source in zip(fused, slices, strict=True):
            target.copy_(source)
    return fused_a, fused_b


def _rows_of(mask: np.ndarray) -> Rows:
    if mask.all():
        return None
    rows = np.flatnonzero(mask)
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


def _add_product(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """`y += x @ a @ b * scale`, in place."""
    if x.dtype != torch.float32 and len(x) > _FEW_ROWS:
        a, b = a.to(x.dtype), b.to(x.dtype)
    hidden = torch.mm(x.to(a.dtype), a)
    if scale != 1.0:
        hidden *= scale
    if y.dtype == b.dtype:
        y.addmm_(hidden, b)
    else:
        y.add_(torch.mm(hidden, b))  # summed in fp32
