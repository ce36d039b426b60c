"""Weights of a mixture of experts: two tensors for all experts of a layer here and in vLLM, three for each on disk.

E experts, H hidden size, I inner size: `gate_up_proj` [E, 2I, H], gate above up, and `down_proj` [E, H, I].
"""

import re

import torch

from core.errors import ConfigError

_STORED = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
VLLM_NAMES = {"w13_weight": "gate_up_proj", "w2_weight": "down_proj"}
"""vLLM's names of the two, and ours."""


def stack_name(name: str) -> str:
    """The parameter that a checkpoint's tensor is a part of, or is."""
    match = _STORED.fullmatch(name)
    return name if match is None else f"{match[1]}.{'down' if match[3] == 'down' else 'gate_up'}_proj"


def put_into(stack: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    """Copy a checkpoint's tensor to its place in a stack; ConfigError if it does not fit there."""
    match = _STORED.fullmatch(name)
    if match is None or int(match[2]) >= len(stack):
        raise ConfigError(f"weight {name} is of an expert that the configuration does not have")
    place = stack[int(match[2])]
    if match[3] != "down":
        place = place.chunk(2)[match[3] == "up"]
    if place.shape != tensor.shape:
        raise ConfigError(f"weight {name} is {tuple(tensor.shape)}, wanted {tuple(place.shape)}")
    place.copy_(tensor)
