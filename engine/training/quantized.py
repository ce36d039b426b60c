"""Linear layers whose base weights stay as a quantized checkpoint packs them.

A packed layer computes its weights when it runs and keeps them no longer than its result needs them: until the end
of the layer without gradients, until the end of the backward slice with them. So at most one decoder layer's weights
exist beside the packed ones, and reference and policy, which run the same layers, compute with the same weights.
The experts of a mixture are packed one by one, as a checkpoint has them, and unpacked together.

What packs a layer is read off the tensors that the checkpoint has for it; the configuration only says what tensors
cannot (`_READERS`). Scales and zero points are constants: gradients flow to the LoRA and through the weights, as
in QLoRA. Activations that an engine quantizes too (W8A8) are not quantized here.

Shapes: K inputs, N outputs, G groups of neighbouring inputs with a scale in common.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from core.errors import UnsupportedModelError

Tensors = Mapping[str, torch.Tensor]

PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMPRESSED_FORMATS = frozenset(
    {"pack-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision"}
)
"""Formats of compressed-tensors; with the last, each group of layers names its own."""
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ's 32-bit words have their eight outputs."""


@dataclass(frozen=True, slots=True)
class _Numbers:
    """A layer's weights [N, K] before they are scaled: `(values - zeros) * scales`, group by group."""

    values: torch.Tensor
    """[N, K], of any type."""
    scales: torch.Tensor
    """[N, G]."""
    zeros: torch.Tensor | int = 0
    """[N, G], or one for all."""
    group_size: int | None = None
    """Inputs of a group, of which the last may have fewer; None: all have the same number."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """A form of packed layers."""

    needs: Mapping[str, torch.dtype | None]
    """Tensors by which the form is known, and their type; None: numbers that are taken in the model's format."""
    read: Callable[[Tensors, tuple[int, int], Mapping[str, Any]], _Numbers]
    """From the tensors of a layer, its [N, K], and the quantization of the configuration."""
    may_have: Mapping[str, torch.dtype | None] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    """Tensors that say nothing about the weights, or nothing that is not known."""


class PackedLinear(nn.Linear):
    """A linear layer of frozen packed weights; a LoRA wraps it as it wraps `nn.Linear`.

    Its parameters are the checkpoint's tensors by their names there, and the bias.
    """

    def __init__(
        self,
        like: nn.Linear,
        tensors: Tensors,
        reader: _Reader,
        quantization: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        """Take the place of `like`, whose weights are wanted in `dtype`."""
        nn.Module.__init__(self)  # without the memory of weights [N, K]
        self.in_features, self.out_features = like.in_features, like.out_features
        self._reader, self._quantization, self._dtype = reader, quantization, dtype
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", like.bias)

    def __getattr__(self, name: str) -> Any:
        """Torch's; `weight`, which PEFT asks for device and type, is a packed tensor where the form has none."""
        return super().__getattr__(self._names[0] if name == "weight" and name not in self._names else name)

    @property
    def num_weights(self) -> int:
        """Weights [N, K] and bias, whatever they are packed in."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.bias.numel())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., K] to [..., N]."""
        return nn.functional.linear(input, self.unpacked(), self.bias)

    @torch.no_grad()
    def unpacked(self) -> torch.Tensor:
        """The weights [N, K], computed anew. `(value - zero)` is exact, its product with the scale is rounded once."""
        tensors = {name: getattr(self, name).detach() for name in self._names}
        numbers = self._reader.read(tensors, (self.out_features, self.in_features), self._quantization)
        return _scaled(numbers, self.in_features).to(self._dtype)


def check_quantization(quantization: Mapping[str, Any]) -> None:  # noqa: C901
    """Refuse a way to quantize weights that the trainer does not know; UnsupportedModelError names it."""
    method = quantization.get("quant_method")
    match method:
        case "compressed-tensors":
            groups = [quantization, *(quantization.get("config_groups") or {}).values()]
            formats = {str(group["format"]) for group in groups if group.get("format")}
            wrong = sorted(formats - _COMPRESSED_FORMATS)
            problem = f"its format is {', '.join(wrong)}" if wrong else ""
            if quantization.get("transform_config"):
                problem = "it has transforms between layers"
        case "gptq":
            bits = {quantization.get("bits")} | _overridden(quantization, "bits")
            problem = "" if bits <= {4, 8} else f"its bits are {', '.join(sorted(map(str, bits)))}"
            if quantization.get("sym") is not True or _overridden(quantization, "sym") - {True}:
                problem = "it is not symmetric"
            if quantization.get("desc_act") and quantization.get("group_size") != -1:
                problem = "its groups follow the order of activations (desc_act)"
        case "awq":
            bits, version = (
                quantization.get("bits", quantization.get("w_bit")),
                quantization.get("version", "gemm"),
            )
            problem = "" if bits == 4 else f"its bits are {bits}"
            if str(version).lower() != "gemm":
                problem = f"its version is {version}"
            if not quantization.get("zero_point"):
                problem = "it has no zero points"
        case "fp8":
            problem = ""
        case _:
            problem = f"training knows {', '.join(_READERS)}"
    if problem:
        raise UnsupportedModelError(f"cannot train on weights quantized with {method}: {problem}")


def pack_linears(
    causal_lm: nn.Module, quantization: Mapping[str, Any], stored: Tensors, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Put a `PackedLinear` in the place of each linear layer that the checkpoint has packed.

    `causal_lm` is on the meta device, and so are the tensors `stored`, which say what the checkpoint has.

    Returns: Names of the parameters of packed layers, with their types.

    Raises:
        UnsupportedModelError: The weights are quantized in a way that the trainer does not know.
    """
    check_quantization(quantization)
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.items():
        layer, _, leaf = name.rpartition(".")
        by_layer.setdefault(layer, {})[leaf] = tensor
    for name, module in list(causal_lm.named_modules()):
        has_stacks = isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
        if has_stacks and _is_packed(by_layer, f"{name}.0.up_proj"):
            _split_experts(module)
    wanted: dict[str, torch.dtype] = {}
    linears = [(name, one) for name, one in causal_lm.named_modules() if isinstance(one, nn.Linear)]
    for name, linear in linears:
        if not _is_packed(by_layer, name):
            continue
        tensors = {leaf: one for leaf, one in by_layer[name].items() if leaf != "bias"}
        reader = _reader_of(name, tensors, quantization)
        forms = {**reader.needs, **reader.may_have}
        empty = {leaf: _empty(one, forms[leaf] or dtype) for leaf, one in tensors.items() if leaf in forms}
        packed = PackedLinear(linear, empty, reader, quantization, dtype)
        _check_shape(name, packed)
        owner, _, leaf = name.rpartition(".")
        if not owner:
            raise UnsupportedModelError(f"{name} is quantized; training computes with an unquantized head only")
        setattr(causal_lm.get_submodule(owner), leaf, packed)
        wanted |= {f"{name}.{one}": form for one, form in _dtypes(packed, dtype).items()}
    return wanted


def _is_packed(by_layer: Mapping[str, Tensors], name: str) -> bool:
    types = {leaf: one.dtype for leaf, one in by_layer.get(name, {}).items() if leaf != "bias"}
    return bool(types) and not (types.keys() == {"weight"} and types["weight"] in PLAIN_DTYPES)


def _split_experts(experts: Any) -> None:
    """Make linear layers of the stacked weights; the stacks exist while the module runs, and for its backward pass."""
    with torch.device("meta"):
        for i in range(experts.num_experts):
            expert: Any = nn.Module()
            for name in ("gate_proj", "up_proj"):
                setattr(expert, name, nn.Linear(experts.hidden_dim, experts.intermediate_dim, bias=False))
            expert.down_proj = nn.Linear(experts.intermediate_dim, experts.hidden_dim, bias=False)
            experts.add_module(str(i), expert)
    del experts.gate_up_proj, experts.down_proj
    experts.register_forward_pre_hook(_stack_experts)
    experts.register_forward_hook(_drop_stacks, always_call=True)


@torch.no_grad()
def _stack_experts(experts: Any, _: Any) -> None:
    """One expert after the other, so that hardly more exists than the stacks."""
    for stack, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        stacked = None
        for i in range(experts.num_experts):
            linears = [experts.get_submodule(f"{i}.{part}") for part in parts]
            own = torch.cat([one.unpacked() if isinstance(one, PackedLinear) else one.weight for one in linears])
            stacked = own.new_empty(experts.num_experts, *own.shape) if stacked is None else stacked
            stacked[i] = own
        setattr(experts, stack, stacked)


def _drop_stacks(experts: Any, _inputs: Any, _output: Any) -> None:
    """Also after an error, which may have come before there was a stack."""
    for stack in ("gate_up_proj", "down_proj"):
        vars(experts).pop(stack, None)


def num_weights(module: nn.Module) -> int:
    """Frozen weights of a module and all within it; packed ones count as unpacked."""
    own = (
        one.num_weights
        if isinstance(one, PackedLinear)
        else sum(weight.numel() for weight in one.parameters(recurse=False) if not weight.requires_grad)
        for one in module.modules()
    )
    return sum(own)


def unpacked_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Memory that the weights of a module's packed layers take while it runs with gradients; 0 if it has none."""
    packed = (one for one in module.modules() if isinstance(one, PackedLinear))
    return sum(one.in_features * one.out_features for one in packed) * dtype.itemsize


def _overridden(quantization: Mapping[str, Any], key: str) -> set[Any]:
    """Values of a key in GPTQ's exceptions for single layers."""
    return {
        one[key] for one in (quantization.get("dynamic") or {}).values() if isinstance(one, dict) and key in one
    }


def _reader_of(name: str, tensors: Tensors, quantization: Mapping[str, Any]) -> _Reader:
    types = {leaf: one.dtype for leaf, one in tensors.items()}
    for reader in _READERS[quantization["quant_method"]]:
        forms = {**reader.needs, **reader.may_have}
        fits = all(_fits(types[leaf], form) for leaf, form in forms.items() if leaf in types)
        if fits and reader.needs.keys() <= types.keys() <= forms.keys() | reader.unread:
            return reader
    has = ", ".join(f"{leaf} ({str(one).removeprefix('torch.')})" for leaf, one in sorted(types.items()))
    raise UnsupportedModelError(f"cannot train on {name}: no known quantization has {has}")


def _fits(dtype: torch.dtype, form: torch.dtype | None) -> bool:
    """Other formats of numbers are converted to the wanted one, packed words are not."""
    return dtype in PLAIN_DTYPES if form in (None, torch.float32) else dtype == form


def _empty(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(like.shape, dtype=dtype, device="meta")


def _dtypes(packed: PackedLinear, dtype: torch.dtype) -> dict[str, torch.dtype]:
    return {leaf: dtype if leaf == "bias" else one.dtype for leaf, one in packed.named_parameters()}


def _check_shape(name: str, packed: PackedLinear) -> None:
    """Unpack nothing at all, on the meta device, where shapes are checked as they are elsewhere."""
    shape = (packed.out_features, packed.in_features)
    try:
        found = tuple(packed.unpacked().shape)
    except (RuntimeError, ValueError, IndexError) as error:
        raise UnsupportedModelError(f"cannot train on {name}: its tensors do not fit together: {error}") from error
    if found != shape:
        raise UnsupportedModelError(f"cannot train on {name}: it is packed as {found}, wanted {shape}")


def _scaled(numbers: _Numbers, num_inputs: int) -> torch.Tensor:
    """Weights [N, K] in the type of the scales."""
    scales, zeros, size = numbers.scales, numbers.zeros, numbers.group_size
    weights = numbers.values.to(scales.dtype)
    if size is not None and num_inputs % size:
        scales, size = scales.repeat_interleave(size, 1)[:, :num_inputs], 1
    groups = weights.view(len(weights), scales.shape[1], size or num_inputs // scales.shape[1])
    if isinstance(zeros, torch.Tensor):
        groups.sub_(zeros.unsqueeze(2))
    elif zeros:
        groups.sub_(zeros)
    groups.mul_(scales.unsqueeze(2))
    return weights


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """32-bit words [..., m] to the numbers [..., m, 32 / bits] in them, from the lowest bits up; 4 or 8 bits each."""
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8)  # the low byte is the first
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def _bits(num_words: int, count: int) -> int:
    """Bits of each of `count` numbers in so many words."""
    for bits in (4, 8):
        if num_words == -(-count * bits // 32):
            return bits
    raise ValueError(f"{count} numbers of 4 or 8 bits are not {num_words} words")


def _read_compressed(tensors: Tensors, shape: tuple[int, int], _: Mapping[str, Any]) -> _Numbers:
    """compressed-tensors: words along the inputs, [N, K/8]; scales [N, G]; zero points along the outputs, [N/8, G]."""
    num_outputs, num_inputs = shape
    words, scales, zeros = tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point")
    bits = _bits(words.shape[1], num_inputs)
    values = _unpack(words, bits).flatten(1)[:, :num_inputs]
    if zeros is None:
        return _Numbers(values, scales, 1 << (bits - 1))
    return _Numbers(values, scales, _unpack(zeros.t(), bits).flatten(1)[:, :num_outputs].t())


def _read_gptq(tensors: Tensors, shape: tuple[int, int], _: Mapping[str, Any]) -> _Numbers:
    """GPTQ: words along the inputs, [K/8, N]; scales [G, N]; the zero is the middle."""
    words = tensors["qweight"]
    bits = _bits(words.shape[0], shape[1])
    values = _unpack(words, bits).transpose(0, 1).flatten(1)
    return _Numbers(values, tensors["scales"].t(), 1 << (bits - 1))


def _read_awq(tensors: Tensors, _shape: tuple[int, int], _: Mapping[str, Any]) -> _Numbers:
    """AWQ: words along the outputs in AWQ's order, [K, N/8] and zero points [G, N/8]; scales [G, N]."""
    values, zeros = (_unpack(tensors[name], 4)[..., _AWQ_NIBBLES].flatten(1).t() for name in ("qweight", "qzeros"))
    return _Numbers(values, tensors["scales"].t(), zeros)


def _read_fp8(tensors: Tensors, shape: tuple[int, int], quantization: Mapping[str, Any]) -> _Numbers:
    """FP8: values [N, K] with one scale, one for each output, or one for each block."""
    values = tensors["weight"]
    scales = tensors["weight_scale"] if "weight_scale" in tensors else tensors["weight_scale_inv"]
    if scales.numel() == 1:
        return _Numbers(values, scales.reshape(1, 1).expand(shape[0], 1))
    if scales.shape == (shape[0], 1):
        return _Numbers(values, scales)
    rows, columns = _block(quantization)
    if scales.shape != (-(-shape[0] // rows), -(-shape[1] // columns)):
        raise ValueError(f"scales {tuple(scales.shape)} of blocks {rows} x {columns}")
    return _Numbers(values, scales.repeat_interleave(rows, 0)[: shape[0]], group_size=columns)


def _block(quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Outputs and inputs of an FP8 block."""
    groups = (quantization.get("config_groups") or {}).values()
    sizes = {tuple(size) for one in groups if (size := (one.get("weights") or {}).get("block_structure"))}
    if size := quantization.get("weight_block_size"):
        sizes.add(tuple(size))
    if len(sizes) != 1:
        raise ValueError("the configuration does not name one size of blocks")
    rows, columns = sizes.pop()
    return int(rows), int(columns)


_OF_ACTIVATIONS = frozenset({"input_scale", "input_zero_point", "output_scale", "q_scale", "k_scale", "v_scale"})
_FP8 = tuple(
    _Reader({"weight": torch.float8_e4m3fn, scales: torch.float32}, _read_fp8, unread=_OF_ACTIVATIONS)
    for scales in ("weight_scale", "weight_scale_inv")
)
_READERS = {
    "compressed-tensors": (
        _Reader(
            {"weight_packed": torch.int32, "weight_scale": None},
            _read_compressed,
            {"weight_zero_point": torch.int32},
            _OF_ACTIVATIONS | {"weight_shape"},
        ),
        *_FP8,
    ),
    # Symmetric, so zero points are known; without an order by activations groups are neighbours.
    "gptq": (
        _Reader({"qweight": torch.int32, "scales": None}, _read_gptq, unread=frozenset({"qzeros", "g_idx"})),
    ),
    "awq": (_Reader({"qweight": torch.int32, "qzeros": torch.int32, "scales": None}, _read_awq),),
    "fp8": _FP8,
}
"""The forms of packed layers by the `quant_method` of the configuration."""
