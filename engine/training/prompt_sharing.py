"""Attention over pairs whose prompt is computed once.

Tokens of a micro-batch lie in one row without padding: all prompts, all chosen completions, all rejected ones. Only
attention knows which belong together: prompts attend causally to themselves, completions to their own prompt and
causally to themselves. Every other operation of a layer is per token, given each token's position.

For attention the tokens are laid out in padded cells: n prompts of P cells, then 2n completions of C cells, chosen
first. Pads are copies of a real token that no real token attends to, and what they compute is dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Where the N tokens of n pairs lie. The device tensors are made once for a micro-batch."""

    num_pairs: int
    prompt_width: int
    """P, tokens of the longest prompt."""
    completion_width: int
    """C, tokens of the longest completion without its last token."""
    cells: torch.Tensor
    """int64 [N]: cell of each token, of n * P + 2n * C."""
    tokens: torch.Tensor
    """int64 [n * P + 2n * C]: token in each cell; 0 in a pad."""
    prompt_lengths: torch.Tensor
    """int64 [n]."""
    position_ids: torch.Tensor
    """int64 [N]: position of each token in its own sequence."""

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, int, int]], device: torch.device) -> "SharedPrompts":
        """From tokens of prompt, chosen and rejected of each pair, those that are computed; not all of them zero."""
        count, prompts = len(lengths), [pair[0] for pair in lengths]
        width, completion_width = max(prompts), max(max(pair[1:]) for pair in lengths)
        rows = [(i * width, prompts[i], 0) for i in range(count)]
        for side in (1, 2):
            start = count * width + (side - 1) * count * completion_width
            rows += [(start + i * completion_width, pair[side], pair[0]) for i, pair in enumerate(lengths)]
        with torch.device("cpu"):  # many small tensors, few transfers
            cells = torch.cat([torch.arange(start, start + length) for start, length, _ in rows])
            position_ids = torch.cat([torch.arange(first, first + length) for _, length, first in rows])
            tokens = torch.zeros(count * (width + 2 * completion_width), dtype=torch.int64)
            tokens[cells] = torch.arange(len(cells))
            prompt_lengths = torch.tensor(prompts, dtype=torch.int64)
        placed = (x.to(device) for x in (cells, tokens, prompt_lengths, position_ids))
        return cls(count, width, completion_width, *placed)

    def mask(self) -> torch.Tensor:
        """Bool [2n, 1, C, P + C]: what a completion's token sees. Made anew in each slice, so that none is held."""
        size = self.completion_width
        device = self.cells.device
        own = torch.ones(size, size, dtype=torch.bool, device=device).tril_()
        in_prompt = torch.arange(self.prompt_width, device=device) < self.prompt_lengths.repeat(2).unsqueeze(1)
        rows = len(in_prompt)
        parts = in_prompt.unsqueeze(1).expand(rows, size, -1), own.expand(rows, size, size)
        return torch.cat(parts, dim=2).unsqueeze(1)


class _Pad(torch.autograd.Function):
    """Tokens to cells [cells, ...]. The gradient of pads is zero and is left out: no sum, the same on every device."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, shared: SharedPrompts) -> torch.Tensor:
        """By row."""
        ctx.shared = shared
        return values.index_select(0, shared.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """By row."""
        return grads[0].index_select(0, ctx.shared.cells), None


class _Unpad(torch.autograd.Function):
    """Cells to tokens, the inverse."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, shared: SharedPrompts) -> torch.Tensor:
        """By row."""
        ctx.shared = shared
        return values.index_select(0, shared.cells)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """By row; nothing flows into pads."""
        shared: SharedPrompts = ctx.shared
        cells = grads[0].new_zeros(len(shared.tokens), *grads[0].shape[1:])
        return cells.index_copy_(0, shared.cells, grads[0]), None


def shared_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared: SharedPrompts,
    **kwargs: Any,
) -> torch.Tensor:
    """Torch's SDPA twice, over prompts and over completions; [1, heads, N, head_dim] to [1, N, heads, head_dim].

    The second one needs a mask, for the ends of prompts differ, and SDPA aligns `is_causal` with the first key. Against
    rows of prompt and completion, which need none, prompts are not computed twice: 20 to 40 % less time on a CPU.
    """
    count, width, size = shared.num_pairs, shared.prompt_width, shared.completion_width
    split = count * width
    pad: Callable[..., torch.Tensor] = _Pad.apply
    unpad: Callable[..., torch.Tensor] = _Unpad.apply
    padded = [pad(x[0].transpose(0, 1), shared) for x in (query, key, value)]
    prompts = [x[:split].view(count, width, *x.shape[1:]) for x in padded]
    outputs = []
    if width:
        heads_first = [x.transpose(1, 2) for x in prompts]
        outputs.append(sdpa_attention_forward(module, *heads_first, None, **kwargs)[0].flatten(0, 1))
    if size:
        completions = [x[split:].view(2 * count, size, *x.shape[1:]) for x in padded]
        # Token-major copies, one per side of a pair.
        keys = [
            torch.cat([torch.cat([prompt, prompt]), own], dim=1)
            for prompt, own in zip(prompts[1:], completions[1:], strict=True)
        ]
        heads_first = [x.transpose(1, 2) for x in (completions[0], *keys)]
        outputs.append(_masked_attention(module, heads_first, shared.mask(), **kwargs).flatten(0, 1))
    return unpad(torch.cat(outputs), shared).unsqueeze(0)


def _masked_attention(
    module: nn.Module,
    heads_first: list[torch.Tensor],
    mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """SDPA of query, key and value [2n, heads, tokens, head_dim] under a mask; to [2n, C, heads, head_dim].

    With a mask transformers repeats keys for each query head, which CUDA's kernels need. A CPU's does not: 20 % less
    time and a third of the memory with 14 heads on 2.
    """
    if mask.device.type == "cpu":
        query, key, value = heads_first
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous()
    return sdpa_attention_forward(module, *heads_first, mask, scaling=scaling, **kwargs)[0]
