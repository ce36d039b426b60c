"""Attention of the trained decoder: over rows, or over pairs whose prompt is computed once.

With shared prompts the tokens of a micro-batch lie in one row without padding: all prompts, all chosen completions,
all rejected ones. Only attention knows which belong together: prompts attend causally to themselves, completions to
their own prompt and causally to themselves. Every other operation of a layer is per token, given each token's position.
In a layer with a sliding window of W tokens, each sees of these only the last W, itself among them.

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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "mace_sdpa"
"""Name of `attention` for `attn_implementation` of a Hugging Face model."""


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Layout of the N tokens of n pairs. The device tensors are made once for a micro-batch."""

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
        """Lay out pairs by the tokens of prompt, chosen and rejected that are computed; not all of them are zero."""
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

    def mask(self, window: int | None = None) -> torch.Tensor:
        """Bool [2n, 1, C, P + C]: what a completion's token sees. Made anew in each slice, so that none is kept."""
        size, device = self.completion_width, self.cells.device
        own = _causal(size, window, device)
        lengths = self.prompt_lengths.repeat(2).view(-1, 1, 1)
        keys = torch.arange(self.prompt_width, device=device)
        in_prompt = keys < lengths
        if window is not None:
            in_prompt = in_prompt & (keys > lengths + torch.arange(size, device=device).unsqueeze(1) - window)
        rows = len(in_prompt)
        return torch.cat((in_prompt.expand(rows, size, -1), own.expand(rows, size, size)), dim=2).unsqueeze(1)


def _causal(num_tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool [T, T]: each token sees itself and those before it, `window` in all."""
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


class _Pad(torch.autograd.Function):
    """Gather tokens into padded cells: [N, ...] -> [cells, ...].

    The gradient of pads is zero and is left out: nothing is summed, so the result is the same on every device.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, shared: SharedPrompts) -> torch.Tensor:
        """Each cell takes its token's row; pads take that of token 0."""
        ctx.shared = shared
        return values.index_select(0, shared.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Each token takes its cell's gradient."""
        return grads[0].index_select(0, ctx.shared.cells), None


class _Unpad(torch.autograd.Function):
    """Gather tokens out of padded cells: [cells, ...] -> [N, ...], the inverse of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, shared: SharedPrompts) -> torch.Tensor:
        """Each token takes its cell's row."""
        ctx.shared = shared
        return values.index_select(0, shared.cells)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Each cell takes its token's gradient; pads take zero."""
        shared: SharedPrompts = ctx.shared
        cells = grads[0].new_zeros(len(shared.tokens), *grads[0].shape[1:])
        return cells.index_copy_(0, shared.cells, grads[0]), None


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: None,
    dropout: float = 0.0,
    *,
    shared_prompts: SharedPrompts | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Torch's SDPA, over rows or over pairs with one prompt; in fp32 where a CPU is to give half-precision gradients.

    On CUDA the gradients of two runs differ by rounding: the kernels' backward passes add with atomics.

    On CPU the half-precision backward kernel takes 5.5 ms where the fp32 one takes 0.7 (16 sequences of 39 tokens, 4
    heads of 32, one core), 8 to 25 % of a step.
    """
    dtype = query.dtype
    if query.requires_grad and query.device.type == "cpu" and dtype != torch.float32:
        query, key, value = query.float(), key.float(), value.float()
    kwargs["dropout"] = dropout
    if shared_prompts is None:
        output = _causal_attention(module, [query, key, value], sliding_window, **kwargs)
    else:
        output = _shared_attention(module, query, key, value, shared_prompts, sliding_window, **kwargs)
    return output.to(dtype), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


def _shared_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared: SharedPrompts,
    window: int | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Torch's SDPA twice, over prompts and over completions: [1, heads, N, head_dim] -> [1, N, heads, head_dim].

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
        outputs.append(_causal_attention(module, heads_first, window, **kwargs).flatten(0, 1))
    if size:
        completions = [x[split:].view(2 * count, size, *x.shape[1:]) for x in padded]
        # Copies of the prompts' keys, one for each side of a pair.
        keys = [
            torch.cat([torch.cat([prompt, prompt]), own], dim=1)
            for prompt, own in zip(prompts[1:], completions[1:], strict=True)
        ]
        heads_first = [x.transpose(1, 2) for x in (completions[0], *keys)]
        outputs.append(_masked_attention(module, heads_first, shared.mask(window), **kwargs).flatten(0, 1))
    return unpad(torch.cat(outputs), shared).unsqueeze(0)


def _causal_attention(
    module: nn.Module, heads_first: list[torch.Tensor], window: int | None, **kwargs: Any
) -> torch.Tensor:
    """SDPA of rows [rows, heads, tokens, head_dim]; to [rows, tokens, heads, head_dim]. A window needs a mask."""
    num_tokens = heads_first[0].shape[2]
    if window is None or num_tokens <= window:
        return sdpa_attention_forward(module, *heads_first, None, **kwargs)[0]
    return _masked_attention(module, heads_first, _causal(num_tokens, window, heads_first[0].device), **kwargs)


def _masked_attention(
    module: nn.Module,
    heads_first: list[torch.Tensor],
    mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """SDPA of query, key and value [rows, heads, tokens, head_dim] under a mask; to [rows, tokens, heads, head_dim].

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
