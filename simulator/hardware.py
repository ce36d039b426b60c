"""The parts of a simulated executor: a device, its memory, and what the planner knows of it at the start."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.batch import IterationSample
from core.config import AppArgs, TrainingConfig
from core.errors import ConfigError
from core.ports import LatencyPredictor
from profiler.online import OnlineLatencyModel
from profiler.profile import Profile
from simulator.trainer import StepModel

_BLOCK_TOKENS = 16
"""vLLM's block on CUDA; `engine.engine_kwargs.block_size` says otherwise."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of executor; all executors of a run are alike."""

    profile: Profile
    """What iterations really cost."""
    new_predictor: Callable[[], LatencyPredictor]
    """Makes the predictor that production would start from: one for each executor, because it learns."""
    step_model: StepModel
    kv_tokens: int
    kv_bytes_per_token: float
    arena_bytes: int
    arena_bytes_per_token: float
    block_tokens: int = 1
    """Tokens of a KV block; `kv_tokens` are rounded down to whole blocks."""


class FrozenPredictor:
    """A predictor that learns nothing: the profile as it was measured, whatever the device does now."""

    def __init__(self, predictor: LatencyPredictor) -> None:
        self.overhead_s = predictor.overhead_s
        self.forward_s, self.forward_upper_s = predictor.forward_s, predictor.forward_upper_s
        self.slice_s, self.slice_upper_s = predictor.slice_s, predictor.slice_upper_s

    def observe(self, sample: IterationSample) -> None:
        """Learn nothing."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder, from its `config.json`."""

    num_layers: int
    layer_weights: int
    head_weights: int
    kv_values_per_token: int
    """Keys and values of one token over all layers."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read a Hugging Face configuration; layers as Llama, Mistral and Qwen have them.

        Raises:
            ConfigError: a size is missing.
        """
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            intermediate, vocabulary = int(config["intermediate_size"]), int(config["vocab_size"])
            num_layers = int(config["num_hidden_layers"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the model's config.json lacks a size: {error}") from error
        head_dim = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        return cls(
            num_layers=num_layers,
            layer_weights=attention + 3 * hidden * intermediate,
            head_weights=hidden * vocabulary,
            kv_values_per_token=2 * num_layers * kv_heads * head_dim,
        )

    @classmethod
    def load(cls, path: Path) -> "ModelShape":
        """Read a `config.json`, or the one in a directory.

        Raises:
            ConfigError: it cannot be read.
        """
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model configuration {path} cannot be read: {error}") from error
        return cls.of(config)

    def step_model(self, training: TrainingConfig) -> StepModel:
        """Sizes that decide the slices of a step."""
        return StepModel(self.num_layers, self.layer_weights, self.head_weights, training.head_chunk_tokens)


def hardware_of(profile: Profile, shape: ModelShape, args: AppArgs) -> Hardware:
    """An executor on the profile's device.

    Args:
        profile: latency and memory of the device.
        shape: the model that was profiled.
        args: settings; `engine.kv_cache_memory_bytes` must be given, there is no device to ask.

    Raises:
        ConfigError: the size of the KV cache is not given.
    """
    if args.engine.kv_cache_memory_bytes is None:
        raise ConfigError("engine.kv_cache_memory_bytes is needed in the trace's args: there is no device to ask")
    value_bytes = 4 if args.model.dtype == "float32" else 2
    kv_bytes = profile.memory.kv_bytes_per_token or shape.kv_values_per_token * value_bytes
    largest = args.training.max_slice_tokens + 2 * args.training.max_length_tokens
    return Hardware(
        profile=profile,
        new_predictor=lambda: OnlineLatencyModel(profile),
        step_model=shape.step_model(args.training),
        kv_tokens=int(args.engine.kv_cache_memory_bytes / kv_bytes),
        kv_bytes_per_token=kv_bytes,
        arena_bytes=int(2 * profile.memory.step_bytes(largest)),
        arena_bytes_per_token=profile.memory.arena_bytes_per_token,
        block_tokens=int(args.engine.engine_kwargs.get("block_size") or _BLOCK_TOKENS),
    )
