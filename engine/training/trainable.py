"""A Hugging Face decoder with a LoRA, addressable one layer at a time.

The base weights are either views of another owner's storage (vLLM's, on CUDA) or an own copy read from the model
directory. They are adopted, never copied, and need no gradient; only the LoRA matrices do. Those are fp32,
whatever the base is, and live on all seven linear layers of every decoder layer, not on the LM head.

Shapes: B sequences, T tokens, H hidden size, V vocabulary. Sequences are padded on the right: under causal
attention no real token sees a pad, so no mask is needed. Or B is 1 and the row holds pairs (`SharedPrompts`).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from core.config import LoraConfig, TrainingConfig
from core.errors import ConfigError
from engine.training.prompt_sharing import SharedPrompts
from engine.training.skeleton import adopt_weights, make_skeleton, read_config, read_weights, training_mode

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_NAME = "shadow"
PEFT_PREFIX = "base_model.model."

Rotary = tuple[torch.Tensor, torch.Tensor]


class TrainableModel:
    """A decoder-only model split into embedding, layers and head. Make one with `TrainableModel.build`.

    Callers set the grad mode (`training_mode`); nothing here does, so that one layer function serves the reference
    pass, the policy pass and the recomputation for backward.
    """

    def __init__(self, causal_lm: nn.Module, lora: LoraConfig, lora_config: peft.LoraConfig) -> None:
        self.causal_lm = causal_lm
        self.lora = lora
        self.lora_config = lora_config
        self.hf_config: Any = causal_lm.config
        decoder: Any = causal_lm.model
        self._embed_tokens: nn.Embedding = decoder.embed_tokens
        self._layers: list[nn.Module] = list(decoder.layers)
        self._norm: nn.Module = decoder.norm
        self._rotary_emb: nn.Module = decoder.rotary_emb
        self._lm_head: Any = causal_lm.lm_head
        self._rotary_cache: Rotary | None = None
        self._lora_modules = [
            [module for module in layer.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
            for layer in self._layers
        ]
        self._lora_parameters = [_lora_parameters(layer, i) for i, layer in enumerate(self._layers)]
        weight = self._embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype

    @classmethod
    def build(
        cls,
        model_dir: str,
        lora: LoraConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> "TrainableModel":
        """Make the skeleton, adopt the base weights, add a fresh LoRA.

        Args:
            model_dir: Local directory with `config.json` (and safetensors, if `weights` is None).
            lora: Rank and alpha.
            dtype: Of the base weights and of the activations.
            device: Where the model runs.
            seed: Of the LoRA's A matrices; B is zero.
            weights: Hugging Face parameter name to tensor; adopted without a copy, inference tensors too.
                `lm_head.weight` may be missing if it is tied to the embedding.

        Raises:
            UnsupportedModelError: The architecture is not one of `SUPPORTED_MODEL_TYPES`.
            ModelNotFoundError: The directory has no readable config or weights.
            ConfigError: A weight is missing or has another shape, dtype or device.
        """
        device = torch.device(device)
        config = read_config(model_dir)
        with training_mode(device):
            causal_lm = make_skeleton(config, device)
            names = [name for name, _ in causal_lm.named_parameters(remove_duplicate=False)]
            if weights is None:
                weights = read_weights(Path(model_dir), set(names), dtype, device)
            adopt_weights(causal_lm, weights, dtype, device)
            lora_config = _peft_config(lora)
            peft.inject_adapter_in_model(lora_config, causal_lm, adapter_name=ADAPTER_NAME)
            causal_lm.eval()
            model = cls(causal_lm, lora, lora_config)
            for parameter in model.lora_parameters().values():
                parameter.data = parameter.data.to(device=device, dtype=torch.float32)
            model.reset_lora(seed)
        return model

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    @property
    def layer_weights(self) -> int:
        """Base weights of one decoder layer, the measure of its work per token."""
        return sum(weight.numel() for weight in self._layers[0].parameters() if not weight.requires_grad)

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the embedding."""
        return self._embed_tokens.num_embeddings

    @property
    def context_tokens(self) -> int:
        """Longest sequence that the position embeddings were made for."""
        return int(self.hf_config.max_position_embeddings)

    def check_lengths(self, config: TrainingConfig) -> None:
        """Raise ConfigError if a sequence could exceed the sliding window, which the layers here do not apply."""
        window = getattr(self.hf_config, "sliding_window", None)
        if window is not None and min(config.max_length_tokens, self.context_tokens) > window:
            raise ConfigError(
                f"training.max_length_tokens is {config.max_length_tokens}, but the model attends to a sliding "
                f"window of {window} tokens; set it to at most {window}"
            )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] to hidden states [B, T, H]."""
        hidden: torch.Tensor = self._embed_tokens(ids)
        return hidden

    def rotary(self, num_tokens: int, position_ids: torch.Tensor | None = None) -> Rotary:
        """Cosine and sine [1, T, head_dim] of positions 0..T-1, or of the given positions [N] below T.

        Cached, so a slice pays for a slice only.
        """
        if self._rotary_cache is None or self._rotary_cache[0].shape[1] < num_tokens:
            size = min(max(64, 1 << (num_tokens - 1).bit_length()), max(self.context_tokens, num_tokens))
            with training_mode(self.device):
                positions = torch.arange(size, device=self.device).unsqueeze(0)
                like = torch.empty(0, dtype=self.dtype, device=self.device)
                self._rotary_cache = self._rotary_emb(like, positions)
        cos, sin = self._rotary_cache
        if position_ids is not None:
            return cos.index_select(1, position_ids), sin.index_select(1, position_ids)
        return cos[:, :num_tokens], sin[:, :num_tokens]

    def run_layer(
        self, i: int, hidden: torch.Tensor, rotary: Rotary, shared: SharedPrompts | None = None
    ) -> torch.Tensor:
        """Decoder layer i on hidden states [B, T, H], causal, no padding mask; or on the row [1, N, H] of `shared`."""
        output: torch.Tensor = self._layers[i](
            hidden, attention_mask=None, position_embeddings=rotary, shared_prompts=shared
        )
        return output

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm before the LM head, [n, H] to [n, H]."""
        normed: torch.Tensor = self._norm(hidden)
        return normed

    @property
    def head_weight(self) -> torch.Tensor:
        """The LM head's matrix [V, H]."""
        weight: torch.Tensor = self._lm_head.weight
        return weight

    def head(self, hidden_chunk: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head, [n, H] to logits [n, V] in the model's dtype."""
        return nn.functional.linear(self.final_norm(hidden_chunk), self.head_weight)

    @contextmanager
    def adapter_disabled(self, layer: int | None = None) -> Iterator[None]:
        """Run as the base model, in one layer or in all: the DPO reference needs no second model.

        Sets PEFT's flag itself: `LoraLayer.enable_adapters` also toggles `requires_grad`, which is slow.
        """
        groups = self._lora_modules if layer is None else [self._lora_modules[layer]]
        try:
            self._set_disabled(groups, True)
            yield
        finally:
            self._set_disabled(groups, False)

    @staticmethod
    def _set_disabled(groups: list[list[Any]], value: bool) -> None:
        for group in groups:
            for module in group:
                module._disable_adapters = value

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """All LoRA matrices, layer after layer, by their names in a saved PEFT adapter."""
        return {name: parameter for layer in self._lora_parameters for name, parameter in layer.items()}

    def layer_parameters(self, i: int) -> list[nn.Parameter]:
        """The LoRA matrices of layer i, in the order of `lora_parameters`."""
        return list(self._lora_parameters[i].values())

    @torch.no_grad()
    def reset_lora(self, seed: int) -> None:
        """A as PEFT draws it (Kaiming uniform), B zero. Drawn on the CPU: the same on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, parameter in self.lora_parameters().items():
            values = torch.zeros(parameter.shape, dtype=torch.float32, device="cpu")
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            parameter.copy_(values)


def _peft_config(lora: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        target_modules=list(TARGET_MODULES),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _lora_parameters(layer: nn.Module, i: int) -> dict[str, nn.Parameter]:
    """LoRA matrices of layer i by their names in a saved PEFT adapter, which leave the adapter's own name out."""
    return {
        f"{PEFT_PREFIX}model.layers.{i}.{name.replace(f'.{ADAPTER_NAME}.', '.')}": parameter
        for name, parameter in layer.named_parameters()
        if ".lora_" in name
    }
