"""Quantized checkpoints as their makers write them, and the same weights dequantized, both made from a plain model.

Codes, scales and zero points are chosen here; the dequantized weights come from these, and never from what was
packed. compressed-tensors packs with its own library, GPTQ and AWQ with vLLM's packers.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack

FP8_MAX = 448.0
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """A way to quantize the linear layers of a decoder."""

    write: Callable[["Form", torch.Tensor], tuple[Tensors, torch.Tensor]]
    """From weights [N, K]: the tensors of a checkpoint, and what they mean [N, K]."""
    config: Callable[["Form"], dict[str, Any]]
    bits: int = 4
    group_size: int | None = 16
    """None: one scale for each output."""
    symmetric: bool = True
    block: tuple[int, int] | None = None
    per_output: bool = False
    has_activations: bool = False


def codes_of(form: Form, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K] from 0 up, scales and zeros [N, G], and the weights that they mean.

    Scales are rounded to bfloat16, so that every format of a checkpoint can hold them.
    """
    size, top = form.group_size or weight.shape[1], 2**form.bits - 1
    groups = weight.float().unflatten(1, (-1, size))
    if form.symmetric:
        scales = groups.abs().amax(2) / (top / 2)
        zeros = torch.full_like(scales, 2 ** (form.bits - 1))
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = (high - low) / top
        zeros = (-low / scales).round().clamp(0, top)
    scales = scales.clamp(min=1e-6).bfloat16().float()
    codes = (groups / scales.unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, top)
    meant = ((codes - zeros.unsqueeze(2)) * scales.unsqueeze(2)).flatten(1)
    return codes.flatten(1).int(), scales, zeros.int(), meant


def _pack_quantized(form: Form, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros, meant = codes_of(form, weight)
    middle = 2 ** (form.bits - 1)
    tensors = {
        "weight_packed": pack_to_int32((codes - middle).to(torch.int8), form.bits),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not form.symmetric:
        packed = pack_to_int32((zeros - middle).to(torch.int8), form.bits, packed_dim=0)
        tensors["weight_zero_point"] = packed.contiguous()
    return tensors, meant


def _pack_quantized_config(form: Form) -> dict[str, Any]:
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "channel" if form.group_size is None else "group",
        "group_size": form.group_size,
    }
    return _compressed_config("pack-quantized", weights)


def _compressed_config(name: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _gptq(form: Form, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros, _ = codes_of(form, weight)
    num_outputs, num_inputs = weight.shape
    stored = (zeros - 1).t().contiguous()  # the first version of the format stores one less
    tensors = {
        "qweight": gptq_pack(codes.t().contiguous(), form.bits, num_inputs, num_outputs),
        "qzeros": gptq_pack(stored.t().contiguous(), form.bits, num_outputs, stored.shape[0]).t().contiguous(),
        "scales": scales.t().contiguous().half(),
        "g_idx": torch.arange(num_inputs, dtype=torch.int32) // (form.group_size or num_inputs),
    }
    return tensors, _meant(codes, tensors["scales"].float().t(), zeros)


def _meant(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    groups = codes.float().unflatten(1, (scales.shape[1], -1))
    return ((groups - zeros.unsqueeze(2)) * scales.unsqueeze(2)).flatten(1)


def _gptq_config(form: Form) -> dict[str, Any]:
    size = -1 if form.group_size is None else form.group_size
    return {"quant_method": "gptq", "bits": form.bits, "group_size": size, "desc_act": False, "sym": True}


def _awq(form: Form, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros, _ = codes_of(form, weight)
    num_outputs, num_inputs = weight.shape
    tensors = {
        "qweight": awq_pack(codes.t().contiguous(), 4, num_inputs, num_outputs),
        "qzeros": awq_pack(zeros.t().contiguous(), 4, zeros.shape[1], num_outputs),
        "scales": scales.t().contiguous().half(),
    }
    return tensors, _meant(codes, tensors["scales"].float().t(), zeros)


def _awq_config(form: Form) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": form.group_size, "zero_point": True, "version": "gemm"}


def _fp8(form: Form, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    weight = weight.float()
    if form.block is None:
        largest = weight.abs().amax(1, keepdim=True) if form.per_output else weight.abs().max().reshape(1)
        scales = largest / FP8_MAX
        spread = scales.expand(weight.shape)
    else:
        rows, columns = (torch.arange(count) // size for count, size in zip(weight.shape, form.block, strict=True))
        scales = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
        for row in rows.unique():
            for column in columns.unique():
                scales[row, column] = weight[rows == row][:, columns == column].abs().max() / FP8_MAX
        spread = scales[rows][:, columns]
    values = (weight / spread).to(torch.float8_e4m3fn)
    name = "weight_scale" if form.block is None or form.per_output else "weight_scale_inv"
    tensors = {"weight": values, name: scales}
    if form.has_activations:
        tensors["input_scale"] = torch.tensor([0.5])
    return tensors, values.float() * spread


def _fp8_config(form: Form) -> dict[str, Any]:
    scheme = "static" if form.has_activations else "dynamic"
    block = {} if form.block is None else {"weight_block_size": list(form.block)}
    return {"quant_method": "fp8", "activation_scheme": scheme, **block}


def _float_quantized_config(form: Form) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    return _compressed_config("float-quantized", weights)


FORMS = {
    "compressed": Form(_pack_quantized, _pack_quantized_config),
    "compressed_zeros": Form(_pack_quantized, _pack_quantized_config, symmetric=False),
    "compressed_channel": Form(_pack_quantized, _pack_quantized_config, group_size=None),
    "compressed_8_bits": Form(_pack_quantized, _pack_quantized_config, bits=8),
    "gptq": Form(_gptq, _gptq_config),
    "gptq_8_bits": Form(_gptq, _gptq_config, bits=8),
    "gptq_channel": Form(_gptq, _gptq_config, group_size=None),
    "awq": Form(_awq, _awq_config, symmetric=False),
    "fp8": Form(_fp8, _fp8_config),
    "fp8_static": Form(_fp8, _fp8_config, has_activations=True),
    "fp8_block": Form(_fp8, _fp8_config, block=(32, 32)),
    "compressed_fp8": Form(_fp8, _float_quantized_config, per_output=True),
}


def quantize(
    plain: Path,
    directory: Path,
    form: Form,
    *,
    skip: Callable[[str], bool] = lambda _: False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the plain model's quantized checkpoint, and beside it the model that it means; returns that directory.

    `skip` names layers that stay as they are. `dtype` is that of everything else in the checkpoint.
    """
    meant_directory = directory.with_name(f"{directory.name}-meant")
    for one in (directory, meant_directory):
        shutil.copytree(plain, one)
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer.endswith("_proj") and not skip(layer):
            tensors, meant[name] = form.write(form, tensor)
            stored |= {f"{layer}.{part}": one.contiguous() for part, one in tensors.items()}
        else:
            stored[name] = meant[name] = tensor.to(dtype)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, meant_directory / "model.safetensors", metadata={"format": "pt"})
    change_config(directory, quantization_config=form.config(form))
    return meant_directory


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_groups(form: Form, size: int) -> Form:
    return replace(form, group_size=size)
