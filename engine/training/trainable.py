"""A Hugging Face decoder with a LoRA, addressable one layer at a time.

The base weights are either views of another owner's storage (vLLM's, on CUDA) or an own copy read from the model
directory. They are adopted, never copied, and need no gradient; only the LoRA matrices do. Those are fp32,
whatever the base is, and live on the linear layers of every decoder layer (`TARGET_MODULES`), not on the LM head, nor
on the router and the experts of a mixture. Linear layers that the checkpoint has quantized are read from it packed,
and stay so (`engine.training.quantized`).

Shapes: B sequences, T tokens, H hidden size, V vocabulary. Sequences are padded on the right: under causal
attention no real token sees a pad, so no mask is needed. Or B is 1 and the row holds pairs (`SharedPrompts`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from core.config import LoraConfig
from core.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from engine.training.attention import ATTENTION, SharedPrompts
from engine.training.experts import put_into, stack_name
from engine.training.quantized import check_quantization, num_weights, pack_linears, unpacked_bytes

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LINEAR = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
TARGET_MODULES = {
    "gemma3_text": _LINEAR,
    "llama": _LINEAR,
    "mistral": _LINEAR,
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "qwen2": _LINEAR,
    "qwen3": _LINEAR,
    "qwen3_moe": _ATTENTION,
}
"""The linear layers with a LoRA, by the model types that can be trained."""
_ADAPTER_NAME = "shadow"

Rotary = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def training_mode(device: torch.device, *, grad: bool = False) -> Iterator[None]:
    """Normal tensors, no autocast, the given grad mode: whatever mode the caller (vLLM's worker) is in."""
    with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.autocast(device.type, enabled=False):
        yield


class TrainableModel:
    """A decoder-only model split into embedding, layers and head. Make one with `TrainableModel.build`.

    Callers set the grad mode (`training_mode`); nothing here does, so that one layer function serves the reference
    pass, the policy pass and the recomputation for backward.
    """

    def __init__(
        self,
        causal_lm: Any,
        lora: LoraConfig,
        lora_config: peft.LoraConfig,
        served_tokens: int | None = None,
    ) -> None:
        self.causal_lm = causal_lm
        self.hf_config: Any = causal_lm.config
        self.lora = lora
        self.lora_config = lora_config
        decoder = causal_lm.model
        self._embed_tokens: nn.Embedding = decoder.embed_tokens
        self._layers: list[nn.Module] = list(decoder.layers)
        self._norm: nn.Module = decoder.norm
        self._rotary_emb: nn.Module = decoder.rotary_emb
        self._rotary_cache: dict[tuple[str | bool, ...], Rotary] = {}
        """By the type of a layer, and whether the factors are those of long sequences."""
        self._has_rotary_types = hasattr(self._rotary_emb, "layer_types")
        rope = self.hf_config.rope_parameters
        is_longrope = rope.get("rope_type") == "longrope"
        self._short_tokens: float = rope["original_max_position_embeddings"] if is_longrope else math.inf
        self._served_tokens = served_tokens or 0
        self.head_weight: torch.Tensor = causal_lm.lm_head.weight
        """The LM head's matrix [V, H]."""
        self.device, self.dtype = self._embed_tokens.weight.device, self._embed_tokens.weight.dtype
        self.num_layers = len(self._layers)
        self.layer_weights = max(num_weights(layer) - _idle_weights(layer) for layer in self._layers)
        """Base weights of one decoder layer that a token goes through, the measure of its work per token."""
        self.unpacked_bytes = max(unpacked_bytes(layer, self.dtype) for layer in self._layers)
        """Memory that the weights of a quantized layer take within a slice, and no longer; 0 if none is quantized."""
        self.head_weights = self.head_weight.numel()
        self.vocab_size = self._embed_tokens.num_embeddings
        """Rows of the embedding, V."""
        self.context_tokens = int(self.hf_config.max_position_embeddings)
        """Longest sequence that the position embeddings were made for."""
        self._lora_modules: list[list[Any]] = [
            [module for module in layer.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
            for layer in self._layers
        ]
        self._lora_parameters = [
            {
                # Their names in a saved PEFT adapter, which leave the adapter's own name out.
                f"base_model.model.model.layers.{i}.{name.replace(f'.{_ADAPTER_NAME}.', '.')}": parameter
                for name, parameter in layer.named_parameters()
                if ".lora_" in name
            }
            for i, layer in enumerate(self._layers)
        ]

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
        served_tokens: int | None = None,
    ) -> "TrainableModel":
        """Make an empty decoder, adopt the base weights, add a fresh LoRA.

        `weights` are tensors by Hugging Face name, adopted without a copy, inference tensors too (`lm_head.weight` may
        be missing if it is tied to the embedding); None: read from the directory's safetensors, as quantized layers
        always are. `dtype` is that of weights and activations. The LoRA's A matrices are drawn from `seed`; B is zero.
        `served_tokens` is the longest sequence that vLLM serves, by which it chooses the factors of LongRoPE; None:
        by the sequence, as transformers does.

        Raises:
            UnsupportedModelError: The architecture is not one of `TARGET_MODULES`, or training does not know
                how the weights are quantized.
            ModelNotFoundError: The directory has no readable config or weights.
            ConfigError: A weight is missing or has another shape, dtype or device.
        """
        device = torch.device(device)
        config = _read_config(model_dir)
        quantization = config.__dict__.pop("quantization_config", None)
        with training_mode(device):
            with torch.device("meta"):
                causal_lm: Any = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
            decoder = causal_lm.model
            with torch.device(device):  # the only buffers of a decoder
                decoder.rotary_emb = type(decoder.rotary_emb)(config=causal_lm.config)
                if hasattr(decoder.embed_tokens, "embed_scale"):
                    decoder.embed_tokens.embed_scale = torch.tensor(decoder.embed_tokens.scalar_embed_scale)
            packed: dict[str, torch.dtype] = {}
            if quantization:
                packed = pack_linears(causal_lm, quantization, _stored_tensors(Path(model_dir)), dtype)
            empty = dict(causal_lm.named_parameters(remove_duplicate=False))
            dtypes = dict.fromkeys(empty, dtype) | packed
            if weights is None:
                weights = _read_weights(Path(model_dir), empty, dtypes, device)
            elif packed:
                weights = {**weights, **_read_weights(Path(model_dir), empty, packed, device)}
            _adopt_weights(causal_lm, weights, dtypes, device)
            lora_config = peft.LoraConfig(
                r=lora.rank,
                lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
                target_modules=list(TARGET_MODULES[config.model_type]),
                lora_dropout=0.0,
                bias="none",
                task_type="CAUSAL_LM",
            )
            peft.inject_adapter_in_model(lora_config, causal_lm, adapter_name=_ADAPTER_NAME)
            causal_lm.eval()
            model = cls(causal_lm, lora, lora_config, served_tokens)
            for parameter in model.lora_parameters().values():
                parameter.data = parameter.data.to(device=device, dtype=torch.float32)
            model.reset_lora(seed)
        return model

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] to hidden states [B, T, H]."""
        return self._embed_tokens(ids)

    def rotary(self, i: int, num_tokens: int, position_ids: torch.Tensor | None = None) -> Rotary:
        """Layer i's cosine and sine [1, T, rotary size] of positions 0..T-1, or of the given positions [N] below T.

        Cached, so a slice pays for a slice only.
        """
        kind = (self.hf_config.layer_types[i],) if self._has_rotary_types else ()
        is_long = max(num_tokens, self._served_tokens) > self._short_tokens
        cos, sin = self._rotary_cache.get((*kind, is_long), (None, None))
        if cos is None or sin is None or cos.shape[1] < num_tokens:
            size = min(max(64, 1 << (num_tokens - 1).bit_length()), max(self.context_tokens, num_tokens))
            # Of LongRoPE's two sets of factors transformers takes that of the last position.
            size = int(max(size, self._short_tokens + 1) if is_long else min(size, self._short_tokens))
            with training_mode(self.device):
                positions = torch.arange(size, device=self.device).unsqueeze(0)
                like = torch.empty(0, dtype=self.dtype, device=self.device)
                cos, sin = self._rotary_cache[*kind, is_long] = self._rotary_emb(like, positions, *kind)
        if position_ids is not None:
            return cos.index_select(1, position_ids), sin.index_select(1, position_ids)
        return cos[:, :num_tokens], sin[:, :num_tokens]

    def run_layer(
        self, i: int, hidden: torch.Tensor, rotary: Rotary, shared: SharedPrompts | None = None
    ) -> torch.Tensor:
        """Decoder layer i on hidden states [B, T, H], causal, no padding mask; or on the row [1, N, H] of `shared`."""
        return self._layers[i](hidden, attention_mask=None, position_embeddings=rotary, shared_prompts=shared)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm before the LM head, [n, H] to [n, H]."""
        return self._norm(hidden)

    @contextmanager
    def adapter_disabled(self, layer: int | None = None) -> Iterator[None]:
        """Run as the base model, in one layer or in all: the DPO reference needs no second model.

        Sets PEFT's flag itself: `LoraLayer.enable_adapters` also toggles `requires_grad`, which is slow.
        """
        groups = self._lora_modules if layer is None else [self._lora_modules[layer]]
        modules = [module for group in groups for module in group]
        try:
            for module in modules:
                module._disable_adapters = True  # noqa: SLF001 - see above
            yield
        finally:
            for module in modules:
                module._disable_adapters = False  # noqa: SLF001 - see above

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """All LoRA matrices, layer after layer, by their names in a saved PEFT adapter."""
        return {name: parameter for layer in self._lora_parameters for name, parameter in layer.items()}

    def layer_parameters(self, i: int) -> list[nn.Parameter]:
        """The LoRA matrices of layer i, in the order of `lora_parameters`."""
        return list(self._lora_parameters[i].values())

    @torch.no_grad()
    def reset_lora(self, seed: int) -> None:
        """Set A as PEFT draws it (Kaiming uniform) and B to zero. Drawn on the CPU: the same on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, parameter in self.lora_parameters().items():
            values = torch.zeros(parameter.shape, dtype=torch.float32, device="cpu")
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            parameter.copy_(values)


def _idle_weights(layer: Any) -> int:
    """Weights of the experts that a token does not go through."""
    gate = getattr(layer.mlp, "gate", None)
    return (
        0 if gate is None else num_weights(layer.mlp.experts) * (gate.num_experts - gate.top_k) // gate.num_experts
    )


def lora_targets(model_dir: str) -> tuple[str, ...]:
    """The linear layers with a LoRA; of a model that cannot be trained, those of most."""
    try:
        return TARGET_MODULES[_read_config(model_dir).model_type]
    except (ModelNotFoundError, UnsupportedModelError):
        return _LINEAR


def check_trainable(model_dir: str) -> None:
    """Raise UnsupportedModelError or ModelNotFoundError if its configuration alone shows that it cannot be trained."""
    config = _read_config(model_dir)
    if quantization := getattr(config, "quantization_config", None):
        check_quantization(quantization)


def _read_config(model_dir: str) -> Any:
    """Read the model's configuration."""
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"no usable model configuration in {model_dir}: {error}") from error
    architectures = config.architectures or []
    causal = all(name.endswith("ForCausalLM") for name in architectures)
    if config.model_type not in TARGET_MODULES or not causal:
        raise UnsupportedModelError(
            f"cannot train {config.model_type} ({', '.join(architectures) or 'no architecture named'}) layer by "
            f"layer; supported: causal language models of type {', '.join(TARGET_MODULES)}"
        )
    for name in ("final_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, name, None):
            raise UnsupportedModelError(f"cannot train {config.model_type} with {name}")
    return config


def _mapped_tensors(directory: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of what is wanted of the directory's safetensors files; contents are read when they are used."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelNotFoundError(f"{directory} has no .safetensors file")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in filter(wanted, file.keys()):
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelNotFoundError(f"{path} cannot be read: {error}") from error


def _stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the directory's files, on the meta device: names, shapes and types."""
    return {name: tensor.to("meta") for name, tensor in _mapped_tensors(directory, lambda _: True)}


def _read_weights(
    directory: Path,
    empty: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Copy the parameters named in `dtypes` out of the directory's files, not their unaligned pages.

    `empty` has their shapes. Those that the files do not have, or not whole, are left out.
    """
    weights: dict[str, torch.Tensor] = {}
    sizes: Counter[str] = Counter()
    stored = _mapped_tensors(directory, lambda name: name in dtypes or stack_name(name) in dtypes)
    for stored_name, tensor in stored:
        name = stored_name if stored_name in dtypes else stack_name(stored_name)
        sizes[name] += tensor.numel()
        if name == stored_name:
            weights[name] = tensor.to(device=device, dtype=dtypes[name], copy=True)
            continue
        if name not in weights:
            weights[name] = torch.empty(empty[name].shape, dtype=dtypes[name], device=device)
        put_into(weights[name], stored_name, tensor)
    return {name: weight for name, weight in weights.items() if sizes[name] == weight.numel()}


def _adopt_weights(
    causal_lm: Any, weights: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype], device: torch.device
) -> None:
    """Put every tensor in its parameter's place without a copy."""
    tied = bool(causal_lm.config.tie_word_embeddings)
    for name, empty in list(causal_lm.named_parameters(remove_duplicate=False)):
        source, dtype = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name, dtypes[name]
        tensor = weights.get(source)
        if tensor is None:
            raise ConfigError(f"the base model has no weight {source}")
        if tensor.shape != empty.shape or tensor.dtype != dtype or tensor.device.type != device.type:
            raise ConfigError(
                f"weight {source} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                f"wanted {tuple(empty.shape)} {dtype} on {device}"
            )
        if tensor.is_inference():  # autograd refuses to save such a tensor: make a normal one of the same storage
            alias = torch.empty(0, dtype=dtype, device=tensor.device)
            tensor = alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        owner, _, leaf = name.rpartition(".")
        setattr(causal_lm.get_submodule(owner), leaf, nn.Parameter(tensor.detach(), requires_grad=False))
