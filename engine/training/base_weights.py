"""One copy of the base weights: the trainer's linear weights are views of vLLM's.

vLLM fuses q, k, v into `qkv_proj` and gate, up into `gate_up_proj` by concatenating rows, so each Hugging Face weight
is a slice of rows of a fused one and needs no copy. Where Hugging Face fuses them too (Phi), and in the stacks of a
mixture's experts, the whole tensor is the weight. On CUDA this is always so. On CPU vLLM packs linear weights for
its kernels and drops the originals; sharing there means to leave them unpacked, which costs decode speed, so
`share_base_weights: auto` gives the trainer its own copy on CPU (docs/measurements/index.md).

Quantized weights are never shared: vLLM repacks them for its kernels, and the trainer has them as the checkpoint does,
a quarter of 16 bits with W4A16.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from core.config import EngineConfig
from core.errors import UnsupportedModelError
from engine.training.experts import VLLM_NAMES

_UNQUANTIZED = UnquantizedLinearMethod | UnquantizedFusedMoEMethod


def is_shared(config: EngineConfig, device_type: str) -> bool:
    """The trainer uses vLLM's tensors, by the setting and the device."""
    if config.share_base_weights == "auto":
        return device_type == "cuda"
    return config.share_base_weights == "always"


@contextmanager
def unpacked_cpu_weights() -> Iterator[None]:
    """While it lasts, linear layers are created so that vLLM's CPU backend leaves their weights unpacked."""
    create_weights = UnquantizedLinearMethod.create_weights

    def create_unpacked(self: Any, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        create_weights(self, layer, *args, **kwargs)
        setattr(layer, "_cpu_skip_gemm_dispatch", True)  # noqa: B010 - read by vLLM's process_weights_after_loading

    UnquantizedLinearMethod.create_weights = create_unpacked
    try:
        yield
    finally:
        UnquantizedLinearMethod.create_weights = create_weights


def huggingface_views(model: nn.Module, hf_config: Any) -> dict[str, torch.Tensor]:
    """Views of a loaded vLLM decoder's parameters under their Hugging Face names, with or without LoRA wrappers.

    Those of quantized layers are left out, their biases too, which some kernels want in another order.

    Raises:
        UnsupportedModelError: a fused weight has unexpected rows (sharded or another architecture), or the kernel of
            a mixture's experts has weights in an order of its own.
    """
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    query_rows = hf_config.num_attention_heads * head_dim
    key_rows = hf_config.num_key_value_heads * head_dim
    fused = {
        "qkv_proj": {"q_proj": query_rows, "k_proj": key_rows, "v_proj": key_rows},
        "gate_up_proj": {"gate_proj": hf_config.intermediate_size, "up_proj": hf_config.intermediate_size},
    }
    for name, parts in getattr(model, "packed_modules_mapping", {}).items():
        if parts == [name]:  # Hugging Face fuses it too
            fused.pop(name, None)
    _check_experts(model)
    quantized = tuple(
        f"{name}."
        for name, layer in model.named_modules()
        if isinstance(layer, LinearBase | RoutedExperts) and not isinstance(layer.quant_method, _UNQUANTIZED)
    )
    views: dict[str, torch.Tensor] = {}
    for vllm_name, parameter in model.named_parameters():
        if vllm_name.startswith(quantized):
            continue
        name, tensor = vllm_name.replace(".base_layer", "").replace(".routed_experts", ""), parameter.detach()
        fused_name = next((one for one in fused if f".{one}." in name), None)
        if fused_name is not None:
            parts = fused[fused_name]
            if tensor.shape[0] != sum(parts.values()):
                raise UnsupportedModelError(
                    f"{name} has {tensor.shape[0]} rows, expected {sum(parts.values())}: "
                    "sharded weights cannot be shared with the trainer"
                )
            slices = torch.split(tensor, list(parts.values()))
            views |= {name.replace(fused_name, part): rows for part, rows in zip(parts, slices, strict=True)}
        elif "embed_tokens" in name or "lm_head" in name:
            views[name] = tensor[: hf_config.vocab_size]  # vLLM pads the vocabulary
        else:
            owner, _, leaf = name.rpartition(".")
            views[f"{owner}.{VLLM_NAMES.get(leaf, leaf)}"] = tensor
    return views


def _check_experts(model: nn.Module) -> None:
    """Of the kernels for experts, Triton's takes their weights in the order of the checkpoint."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if not isinstance(layer, RoutedExperts) or not isinstance(method, UnquantizedFusedMoEMethod):
            continue
        if method.unquantized_backend is not UnquantizedMoeBackend.TRITON:
            raise UnsupportedModelError(
                f"vLLM's kernel for experts ({method.unquantized_backend.value}) orders their weights anew, so that "
                "they cannot be shared with the trainer; engine.share_base_weights: never gives it a copy"
            )
