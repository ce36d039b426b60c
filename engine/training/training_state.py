"""The file from which training goes on after a restart: parameters, optimizer, random numbers, and its progress.

A safetensors file with a JSON header under the key `mace`: `format`, `num_steps`, `shapes` (of the LoRA matrices, to
tell another model's file) and `progress` (JSON of the learner, not looked at here). Format 1 had neither progress nor
random numbers.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from core.errors import AdapterError, DamagedAdapterError
from core.files import atomic_file

logger = logging.getLogger(__name__)

_FORMAT = 2
_READABLE_FORMATS = (1, 2)
_RNG_PREFIX = "rng_"


@dataclass(slots=True)
class TrainingState:
    """A shadow adapter and its optimizer at one moment."""

    tensors: dict[str, torch.Tensor]
    """`flat`, `exp_avg`, `exp_avg_sq` [P] and `step` []: fp32, on any device."""
    num_steps: int
    shapes: dict[str, list[int]]
    """LoRA matrices by PEFT name, in the order in which `flat` holds them."""
    rng: dict[str, torch.Tensor] = field(default_factory=dict)
    """Torch's generators by device type, as bytes."""
    is_leased: bool = False
    """Someone is reading the tensors: they must not be overwritten."""


def write_training_state(path: Path, state: TrainingState, progress: dict[str, Any]) -> None:
    """Write a state atomically. Copies from the device on a stream of its own, so that other threads' work goes on.

    Raises:
        AdapterError: The file cannot be written, or progress is no JSON; an older file at `path` is intact.
    """
    try:
        header = {
            "format": _FORMAT,
            "num_steps": state.num_steps,
            "shapes": state.shapes,
            "progress": progress,
        }
        metadata = {"mace": json.dumps(header)}
        named = state.tensors | {f"{_RNG_PREFIX}{device}": tensor for device, tensor in state.rng.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            save_file(_on_host(named), partial, metadata=metadata)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise AdapterError(f"training state cannot be written to {path}: {error}") from error


def read_training_state(path: Path) -> tuple[TrainingState, dict[str, Any]]:
    """A written state, on the CPU, and its progress.

    Raises:
        DamagedAdapterError: The file is missing, unreadable or of an unknown format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("mace", "{}"))
        named = load_file(path)
        if header.get("format") not in _READABLE_FORMATS:
            raise ValueError(f"unknown format {header.get('format')!r}")
        state = TrainingState(
            tensors={name: tensor for name, tensor in named.items() if not name.startswith(_RNG_PREFIX)},
            num_steps=int(header["num_steps"]),
            shapes=header["shapes"],
            rng={n.removeprefix(_RNG_PREFIX): t for n, t in named.items() if n.startswith(_RNG_PREFIX)},
        )
        progress = header.get("progress", {})
        if not isinstance(progress, dict):
            raise TypeError("progress is not an object")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise DamagedAdapterError(f"training state {path.name} cannot be read: {error}") from error
    return state, progress


def check_tensors(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Size], source: str) -> None:
    """Raise DamagedAdapterError unless names and shapes are exactly the wanted ones, and all values finite."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != dict(wanted):
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise DamagedAdapterError(f"{source}: {len(odd)} tensors are missing, extra or misshapen, first {odd[0]}")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DamagedAdapterError(f"{source}: {name} holds values that are not finite")


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Torch's generators that a step on this device could draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Inverse of `random_state`; one that does not fit (another torch) is left out, for no step here draws from it."""
    try:
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "cuda" in states and device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], device)
    except (RuntimeError, TypeError) as error:
        logger.warning("the random state of the checkpoint is ignored: %s", error)


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = tensors["flat"].device
    if device.type != "cuda":
        return tensors
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        return {name: tensor.cpu() for name, tensor in tensors.items()}
