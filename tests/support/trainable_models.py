"""Tiny random decoders and tasks for the tests of the sliced DPO step."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from core.config import LoraConfig, TrainingConfig
from core.types import FineTuneTask, TaskKind, TokenizedPair
from engine.training.dpo import DpoStep
from engine.training.shadow import ShadowAdapter
from engine.training.trainable import TrainableModel

VOCAB = 61
WINDOW = 6
CONFIGS = {
    "gemma3_text": Gemma3TextConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}
_OWN_FIELDS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 12,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        },
    },
    "mistral": {"sliding_window": WINDOW},
    "phi3": {
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    },
    "qwen3_moe": {
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 6.0],
}
"""Of Phi."""


def make_config(kind: str, **changes: Any) -> PreTrainedConfig:
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return CONFIGS[kind](**(fields | _OWN_FIELDS.get(kind, {}) | changes))


def save_model(directory: Path, kind: str, seed: int = 3, **changes: Any) -> str:
    """Write a random fp32 model; biases and norms random too, so that a wrong one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(kind, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return str(directory)


def build(directory: str, *, rank: int = 4, warm: bool = True, **kwargs: Any) -> TrainableModel:
    """Build on the CPU in fp32; `warm` sets B to non-zero values, so that policy and reference differ."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "seed": 5} | kwargs
    model = TrainableModel.build(directory, LoraConfig(rank=rank, alpha=2.0 * rank), **options)
    if warm:
        warm_up(model)
    return model


def warm_up(model: TrainableModel) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.lora_parameters().items():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def make_task(num_pairs: int = 4, kind: TaskKind = TaskKind.TRAIN, seed: int = 0) -> FineTuneTask:
    """Pairs of uneven lengths."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(low, high)))

    pairs = tuple(
        TokenizedPair(f"p{i}", tokens(2, 6), (*tokens(1, 9), 2), (*tokens(3, 7), 2)) for i in range(num_pairs)
    )
    return FineTuneTask(f"{kind}-{seed}", kind, pairs)


def make_training(**changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.01, "seed": 5}
    if "max_length_tokens" in changes:
        fields["max_prompt_tokens"] = changes["max_length_tokens"] - 1
    return TrainingConfig(**(fields | changes))


def snapshot(shadow: ShadowAdapter) -> dict[str, torch.Tensor]:
    """Copies of parameters, moments and step count."""
    copies = {name: tensor.detach().cpu().clone() for name, tensor in shadow.state_tensors().items()}
    return {**copies, "num_steps": torch.tensor(shadow.num_steps)}


def run_to_loss(step: DpoStep) -> None:
    """Run all slices but the optimizer's."""
    while len(step.pending) > 1:
        step.run_slice()


def run(step: DpoStep) -> DpoStep:
    while step.next_slice is not None:
        step.run_slice()
    return step


def start(
    directory: str,
    task: FineTuneTask,
    config: TrainingConfig | None = None,
    *,
    share_prompt: bool = True,
    **kwargs: Any,
) -> tuple[TrainableModel, ShadowAdapter, DpoStep]:
    config = config or make_training()
    model = build(directory, **kwargs)
    shadow = ShadowAdapter(model, config)
    return model, shadow, DpoStep(model, shadow, task, config, share_prompt=share_prompt)
