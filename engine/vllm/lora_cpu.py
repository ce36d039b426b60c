"""LoRA on the CPU, computed by version instead of by token.

vLLM's CPU path (`PunicaWrapperCPU`) gathers the matrices of an adapter once for every token: for one adapter in a
batch of eight tokens it copies that adapter's weights eight times, in every linear layer. Here the rows of a batch are
grouped by version when the batch is composed, and each group costs two matrix products per fused layer (q, k, v are
one; gate, up are one), whatever its size; a batch without adapters costs nothing. The rows of base requests stay as
they are, where vLLM adds the adapter of the last slot to them if other rows have one (its index of "none" is -1).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as cpu_ops
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_KERNELS_OF_A_LAYER = 32
"""Numbers of rows for which a packed matrix keeps its oneDNN kernel; vLLM's number for the layers themselves."""

Rows = slice | torch.Tensor | None
"""Rows of a batch; None stands for all."""

Product = Callable[[torch.Tensor], torch.Tensor]


class LayerAdapters:
    """The adapters in the slots of one layer, each as the two matrices that its rows are multiplied with.

    They are made from vLLM's slots when a slot is first used, and again after `forget`.
    """

    def __init__(self, a_slices: Sequence[torch.Tensor], b_slices: Sequence[torch.Tensor]) -> None:
        """`a_slices` `[slots, 1, rank, inputs]` and `b_slices` `[slots, 1, outputs, rank]`, as vLLM stacks them."""
        self._a, self._b = a_slices, b_slices
        self._products: list[tuple[Product, Product] | None] = [None] * len(a_slices[0])

    def forget(self, slot: int) -> None:
        """The slot is about to hold another adapter."""
        self._products[slot] = None

    def add(self, y: torch.Tensor, x: torch.Tensor, slot: int, scale: float) -> None:
        """`y += x @ A @ B * scale` in place, with `x` `[rows, inputs]` and `y` `[rows, outputs]`."""
        products = self._products[slot] or self._pack(slot)
        hidden = products[0](x)
        if scale != 1.0:
            hidden *= scale
        y.add_(products[1](hidden))

    def _pack(self, slot: int) -> tuple[Product, Product]:
        a = torch.cat([one[slot, 0] for one in self._a])
        b = torch.block_diag(*(one[slot, 0] for one in self._b))  # type: ignore[no-untyped-call]
        self._products[slot] = products = _product(a.t()), _product(b.t())
        return products


class GroupedLora(PunicaWrapperCPU):
    """vLLM's wrapper with `add_lora_linear` by groups. All else is vLLM's, such as adapters of the head."""

    _groups: Sequence[tuple[int, Rows]] = ()
    _num_rows = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._layers: dict[int, LayerAdapters] = {}

    def take_over(self, layer: BaseLinearLayerWithLoRA) -> None:
        """Compute a layer's adapters from now on. What its slots hold stays."""
        adapters = LayerAdapters(layer.lora_a_stacked, layer.lora_b_stacked)
        self._layers[id(layer.lora_a_stacked)] = adapters  # the layer keeps this tuple, and hands it over
        reset = layer.reset_lora

        def reset_lora(index: int) -> None:
            adapters.forget(index)
            reset(index)

        layer.reset_lora = reset_lora  # every change of a slot begins with it
        if layer.tp_size == 1 and hasattr(layer.base_layer, "cpu_linear"):
            layer.forward = self._short_forward(layer, adapters)

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
        adapters = self._layers.get(id(lora_a_stacked))
        if adapters is None or kwargs or (self._groups and len(x) != self._num_rows):
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
            return
        self._add(y, x, adapters, scale)

    def _add(self, y: torch.Tensor, x: torch.Tensor, adapters: LayerAdapters, scale: float = 1.0) -> None:
        for slot, rows in self._groups:
            if rows is None:
                adapters.add(y, x, slot, scale)
            elif isinstance(rows, slice):
                adapters.add(y[rows], x[rows], slot, scale)
            else:
                part = y[rows]
                adapters.add(part, x[rows], slot, scale)
                y[rows] = part

    def _short_forward(self, layer: BaseLinearLayerWithLoRA, adapters: LayerAdapters) -> Callable[..., Any]:
        """What `layer.forward` does on one CPU. The way there through vLLM's layers takes as long as the sum of the
        smaller products itself (docs/measurements/lora-cpu.md)."""
        base, general = layer.base_layer, layer.forward
        linear, weight, returns_bias = base.cpu_linear, base.weight, base.return_bias
        bias, output_bias = (None, base.bias) if base.skip_bias_add else (base.bias, None)

        def forward(x: torch.Tensor) -> Any:
            if x.ndim != 2 or (self._groups and len(x) != self._num_rows):
                return general(x)
            y = linear(x, weight, bias)
            if self._groups:
                self._add(y, x, adapters)
            return (y, output_bias) if returns_bias else y

        return forward


def group_by_version(manager: Any, max_num_batched_tokens: int, device: torch.device) -> None:
    """Let the layers of a `LoRAModelManager` compute by version."""
    grouped = GroupedLora(
        max_num_batched_tokens, max_batches=manager.max_num_seqs, device=device, lora_config=manager.lora_config
    )
    for name in manager.punica_wrapper_mapping:
        manager.punica_wrapper_mapping[name] = grouped
    for layer in manager.modules.values():
        layer.set_mapping(grouped)
        if isinstance(layer, BaseLinearLayerWithLoRA):
            grouped.take_over(layer)


def _product(matrix: torch.Tensor) -> Product:
    """The product of rows with `matrix` `[inputs, outputs]`, which is packed where that is faster.

    For few rows torch's products in half precision take longer to begin than to compute; vLLM's packed ones begin in
    half of that time. In fp32 torch's begin at once.
    """
    if matrix.dtype == torch.float32 or not hasattr(torch.ops._C, "create_onednn_mm_handler"):  # noqa: SLF001 - vLLM's
        return partial(torch.mm, mat2=matrix)
    handler = cpu_ops.create_onednn_mm(matrix, _KERNELS_OF_A_LAYER)
    return lambda x: cpu_ops.onednn_mm(handler, x, None)


def _rows_of(mask: np.ndarray) -> Rows:
    if mask.all():
        return None
    rows = np.flatnonzero(mask)
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)
