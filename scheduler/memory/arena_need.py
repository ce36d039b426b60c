"""Memory of a DPO step from the model's dimensions, for an engine that has neither a profile nor a measured step.

Per padded token of a micro-batch, with d bytes a value, H hidden size and L layers (`engine.training.dpo`,
`engine.training.dpo_work`):

- held between slices: the kept input of each layer, the hidden state or its gradient, and the head's gradient of
  each scored token, `(L + 2)·H·d` at most; log-probabilities of the two passes, 8; and, whatever the size, the LoRA
  gradients in fp32, 4 for each parameter;
- in the backward slice of one layer, for its duration: what autograd keeps of attention and MLP, and their gradients;
- in a head chunk: a block of logits in fp32, its copy in the weights' dtype, and rows of H.

The optimizer's moments (8 bytes a parameter) are there whether a step runs or not: `optimizer_bytes` is not part of
the arena. Attention is taken as computed in tiles: a kernel that keeps the T x T scores needs more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError

_VOCABULARY_BLOCK = 8192
"""As in `engine.training.dpo_loss`: columns of logits at a time."""
_FP32 = 4


@dataclass(frozen=True, slots=True)
class ModelDims:
    """A decoder of Llama's kind with a LoRA on its seven linear layers."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype_bytes: int
    lora_rank: int
    head_chunk_tokens: int

    @classmethod
    def of(
        cls, config: Mapping[str, Any], *, dtype_bytes: int, lora_rank: int, head_chunk_tokens: int
    ) -> "ModelDims":
        """From a Hugging Face `config.json`.

        Raises:
            ConfigError: a size is missing.
        """
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            layers, vocabulary = int(config["num_hidden_layers"]), int(config["vocab_size"])
            intermediate = int(config["intermediate_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the model's config.json lacks a size: {error}") from error
        return cls(
            num_layers=layers,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=vocabulary,
            dtype_bytes=dtype_bytes,
            lora_rank=lora_rank,
            head_chunk_tokens=head_chunk_tokens,
        )

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def linear_layers(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of q, k, v, o, gate, up and down."""
        hidden, inner, query, kv = self.hidden_size, self.intermediate_size, self.query_size, self.kv_size
        attention = ((hidden, query), (hidden, kv), (hidden, kv), (query, hidden))
        return (*attention, (hidden, inner), (hidden, inner), (inner, hidden))

    @property
    def num_lora_parameters(self) -> int:
        """Of all layers."""
        return self.num_layers * self.lora_rank * sum(i + o for i, o in self.linear_layers)


@dataclass(frozen=True, slots=True)
class ArenaNeed:
    """Bytes of a step by the padded tokens of its micro-batches."""

    dims: ModelDims

    @property
    def gradient_bytes(self) -> int:
        """LoRA gradients, held from the first backward slice to the optimizer's."""
        return _FP32 * self.dims.num_lora_parameters

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments; permanent, so not part of the arena."""
        return 2 * _FP32 * self.dims.num_lora_parameters

    def held_bytes(self, num_tokens: int) -> int:
        """Most that is held between two slices (`DpoStep.activation_bytes`): an upper bound."""
        dims = self.dims
        per_token = (dims.num_layers + 2) * dims.hidden_size * dims.dtype_bytes + 2 * _FP32
        return num_tokens * per_token + self.gradient_bytes

    def transient_bytes(self, num_tokens: int) -> int:
        """Most that one slice needs beside that, for its duration."""
        return max(num_tokens * self.layer_bytes_per_token, self._head_bytes(num_tokens))

    @property
    def layer_bytes_per_token(self) -> int:
        """What autograd keeps for the backward pass of one layer.

        Two norms keep their input and its fp32 copy; attention keeps queries and keys before and after rotation,
        values and its output; the MLP keeps gate, its activation, up and their product; a LoRA keeps its input in
        fp32 (a copy unless the model is fp32) and the narrow product.
        """
        dims = self.dims
        inputs = dims.hidden_size * 2 + dims.query_size + dims.intermediate_size
        kept = 6 * dims.hidden_size + 3 * dims.query_size + 3 * dims.kv_size + 4 * dims.intermediate_size
        lora = (_FP32 * inputs if dims.dtype_bytes < _FP32 else 0) + _FP32 * 7 * dims.lora_rank
        return dims.dtype_bytes * kept + 2 * _FP32 * 2 * dims.hidden_size + lora

    def _head_bytes(self, num_tokens: int) -> int:
        dims = self.dims
        chunk = min(dims.head_chunk_tokens, num_tokens)
        logits = min(dims.vocab_size, _VOCABULARY_BLOCK) * (_FP32 + dims.dtype_bytes)
        return chunk * (logits + 3 * _FP32 * dims.hidden_size)
