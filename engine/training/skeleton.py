"""An empty Hugging Face decoder and the weights that go into it: own ones from disk, or another owner's, not copied."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from core.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from engine.training.prompt_sharing import SharedPrompts, shared_attention

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ATTENTION = "mace_sdpa"


@contextmanager
def training_mode(device: torch.device, *, grad: bool = False) -> Iterator[None]:
    """Normal tensors, no autocast, the given grad mode: whatever mode the caller (vLLM's worker) is in."""
    with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.autocast(device.type, enabled=False):
        yield


def read_config(model_dir: str) -> Any:
    """The model's configuration.

    Raises:
        ModelNotFoundError: There is none, or it cannot be read.
        UnsupportedModelError: The architecture is not one of `SUPPORTED_MODEL_TYPES`.
    """
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"no usable model configuration in {model_dir}: {error}") from error
    architectures = config.architectures or []
    causal = all(name.endswith("ForCausalLM") for name in architectures)
    if config.model_type not in SUPPORTED_MODEL_TYPES or not causal:
        raise UnsupportedModelError(
            f"cannot train {config.model_type} ({', '.join(architectures) or 'no architecture named'}) layer by "
            f"layer; supported: causal language models of type {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return config


def make_skeleton(config: Any, device: torch.device) -> Any:
    """The module tree with parameters on meta and a real rotary embedding, its only buffers."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=_ATTENTION)
    with torch.device(device):
        causal_lm.model.rotary_emb = type(causal_lm.model.rotary_emb)(config=causal_lm.config)
    return causal_lm


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shared_prompts: SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Torch's SDPA, over rows or over pairs with one prompt; in fp32 where a CPU is to give half-precision gradients.

    There the half-precision backward kernel takes 5.5 ms where the fp32 one takes 0.7 (16 sequences of 39 tokens, 4
    heads of 32, one core), 8 to 25 % of a step.
    """
    dtype = query.dtype
    if query.requires_grad and query.device.type == "cpu" and dtype != torch.float32:
        query, key, value = query.float(), key.float(), value.float()
    if shared_prompts is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    else:
        output = shared_attention(module, query, key, value, shared_prompts, **kwargs)
    return output.to(dtype), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)


def read_weights(
    directory: Path, names: set[str], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """An own copy of the named parameters from the directory's safetensors files, not their unaligned pages.

    Raises:
        ModelNotFoundError: There is no such file, or one cannot be read.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelNotFoundError(f"{directory} has no .safetensors file")
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in names.intersection(file.keys()):
                    weights[name] = file.get_tensor(name).to(device=device, dtype=dtype, copy=True)
        except (OSError, SafetensorError) as error:
            raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
    return weights


def adopt_weights(
    causal_lm: Any, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Put every tensor in its parameter's place without a copy.

    Raises:
        ConfigError: A weight is missing or has another shape, dtype or device.
    """
    tied = bool(causal_lm.config.tie_word_embeddings)
    for name, skeleton in list(causal_lm.named_parameters(remove_duplicate=False)):
        source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        tensor = weights.get(source)
        if tensor is None:
            raise ConfigError(f"the base model has no weight {source}")
        if tensor.shape != skeleton.shape or tensor.dtype != dtype or tensor.device.type != device.type:
            raise ConfigError(
                f"weight {source} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                f"wanted {tuple(skeleton.shape)} {dtype} on {device}"
            )
        parameter = nn.Parameter(_without_inference_flag(tensor), requires_grad=False)
        if parameter.data_ptr() != tensor.data_ptr():
            raise ConfigError(f"weight {source} could not be adopted without a copy")
        owner, _, leaf = name.rpartition(".")
        setattr(causal_lm.get_submodule(owner), leaf, parameter)


def _without_inference_flag(tensor: torch.Tensor) -> torch.Tensor:
    """The same storage as a normal tensor: autograd refuses to save a tensor that was made in inference mode."""
    if not tensor.is_inference():
        return tensor.detach()
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
