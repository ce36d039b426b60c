"""Sizes of a decoder of Llama's kind, from its `config.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, slots=True)
class ModelDims:
    """The sizes that decide the memory and the work of a training step, and the size of the KV cache."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Inner size of the MLP, or of one expert."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype_bytes: int
    """Bytes of one value of weights and activations."""
    is_tied: bool = False
    """The head's matrix is the embedding's."""
    context_tokens: int | None = None
    """Longest sequence that the position embeddings were made for; None: the configuration does not say."""
    num_experts: int = 0
    """Experts of each layer, with a router over them; 0: an MLP."""
    experts_per_token: int = 1
    """Experts that a token goes through; 1 for an MLP."""
    is_fused: bool = False
    """q, k and v are one linear layer, gate and up another."""

    @classmethod
    def of(cls, config: Mapping[str, Any], *, dtype_bytes: int) -> "ModelDims":
        """Read a Hugging Face configuration; ConfigError if a size is missing."""
        try:
            hidden, intermediate, layers, heads, vocabulary = (int(config[name]) for name in _SIZES)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the model's config.json lacks a size: {error}") from error
        experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
        return cls(
            num_layers=layers,
            hidden_size=hidden,
            intermediate_size=int((experts and config.get("moe_intermediate_size")) or intermediate),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=vocabulary,
            dtype_bytes=dtype_bytes,
            is_tied=bool(config.get("tie_word_embeddings")),
            context_tokens=config.get("max_position_embeddings"),
            num_experts=experts,
            experts_per_token=int((experts and config.get("num_experts_per_tok")) or 1),
            is_fused=config.get("model_type") == "phi3",
        )

    @classmethod
    def load(cls, path: Path, *, dtype_bytes: int) -> "ModelDims":
        """Read a `config.json`, or the one in a directory; ConfigError if that fails."""
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model configuration {path} cannot be read: {error}") from error
        return cls.of(config, dtype_bytes=dtype_bytes)

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def inner_size(self) -> int:
        """Width of all that a token goes through within the MLP or the experts."""
        return self.experts_per_token * self.intermediate_size

    @property
    def adapted_layers(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the linear layers with a LoRA: q, k, v, o, gate, up and down; no experts."""
        hidden, inner, query, kv = self.hidden_size, self.intermediate_size, self.query_size, self.kv_size
        if self.is_fused:
            return (hidden, query + 2 * kv), (query, hidden), (hidden, 2 * inner), (inner, hidden)
        attention = ((hidden, query), (hidden, kv), (hidden, kv), (query, hidden))
        return attention if self.num_experts else (*attention, (hidden, inner), (hidden, inner), (inner, hidden))

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's linear maps that a token goes through."""
        attention = 2 * self.hidden_size * (self.query_size + self.kv_size)
        return attention + self.hidden_size * (3 * self.inner_size + self.num_experts)

    @property
    def stored_layer_weights(self) -> int:
        """The same with all experts."""
        other_experts = max(0, self.num_experts - self.experts_per_token)
        return self.layer_weights + other_experts * 3 * self.intermediate_size * self.hidden_size

    @property
    def head_weights(self) -> int:
        """Parameters of the language model head."""
        return self.hidden_size * self.vocab_size

    @property
    def num_weights(self) -> int:
        """Parameters of the model but for biases and the norms of heads, a thousandth of them at most."""
        layers = self.num_layers * (self.stored_layer_weights + 2 * self.hidden_size)
        return layers + self.hidden_size + self.head_weights * (1 if self.is_tied else 2)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.num_layers * self.kv_size * self.dtype_bytes
