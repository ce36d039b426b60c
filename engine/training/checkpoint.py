"""The file from which training goes on after a restart: parameters, optimizer, random numbers, and its progress.

A safetensors file with a JSON header under the key `mace`: `format`, `num_steps`, `shapes` (of the LoRA matrices, to
tell another model's file) and `progress` (JSON of the learner, not looked at here). Format 1 had neither progress nor
random numbers. `CheckpointWriter` writes such files in a thread of its own, so that neither inference nor slices wait
for the disk.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from core.errors import AdapterError, DamagedAdapterError, MaceError
from core.files import atomic_file, make_directory

logger = logging.getLogger(__name__)

_FORMAT = 2
_READABLE_FORMATS = (1, 2)
_RNG_PREFIX = "rng_"
PATIENCE_S = 10.0
"""A write that takes longer is behind no more: training must not stand still for a disk that hangs."""


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
    header = {"format": _FORMAT, "num_steps": state.num_steps, "shapes": state.shapes, "progress": progress}
    named = state.tensors | {f"{_RNG_PREFIX}{device}": tensor for device, tensor in state.rng.items()}
    try:
        metadata = {"mace": json.dumps(header)}
        make_directory(path.parent)
        with atomic_file(path) as partial:
            save_file(_on_host(named), partial, metadata=metadata)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise AdapterError(f"training state cannot be written to {path}: {error}") from error


def read_training_state(path: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Read a state, to the CPU, and its progress; DamagedAdapterError if the file is missing, unreadable or unknown."""
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


@dataclass(slots=True)
class _Job:
    path: Path
    state: TrainingState
    progress: dict[str, Any]
    submitted_s: float = field(default_factory=time.monotonic)


class CheckpointWriter:
    """One write at a time; of the states that wait behind it only the newest is kept.

    A submitted state is leased (`is_leased`) until it is on disk or was overtaken. Failures are logged once and kept
    for `take_error`; nothing here raises because of a disk.
    """

    def __init__(
        self, write: Callable[[Path, TrainingState, dict[str, Any]], None] = write_training_state
    ) -> None:
        self._write = write
        self._changed = threading.Condition()
        self._writing: _Job | None = None
        self._waiting: _Job | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._logged_error: str | None = None

    def submit(self, path: Path, state: TrainingState, progress: dict[str, Any]) -> None:
        """Write a state as soon as the one before it is written. Whoever made it must not change it until then."""
        state.is_leased = True
        with self._changed:
            if self._waiting is not None:
                self._waiting.state.is_leased = False
            self._waiting = _Job(path, state, progress)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mace-checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def take_back(self) -> TrainingState | None:
        """Give up the write that has not begun, and return its state; None if none waits."""
        with self._changed:
            job, self._waiting = self._waiting, None
            if job is None:
                return None
            job.state.is_leased = False
            self._changed.notify_all()
            return job.state

    def is_behind(self) -> bool:
        """A state is still on its way to disk, and not for longer than `PATIENCE_S`."""
        with self._changed:
            oldest = self._writing or self._waiting
            return oldest is not None and time.monotonic() - oldest.submitted_s < PATIENCE_S

    def is_writing(self) -> bool:
        """A state is still on its way to disk."""
        with self._changed:
            return self._writing is not None or self._waiting is not None

    def wait(self, timeout_s: float) -> bool:
        """Wait until every submitted state was written or has failed; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._writing is None and self._waiting is None, timeout_s)

    def note_error(self, message: str) -> None:
        """Remember a failure; logged unless it is the same as the last one."""
        with self._changed:
            self._error = message
            is_new = message != self._logged_error
            self._logged_error = message
        if is_new:
            logger.error("checkpoint failed, training goes on without it: %s", message)

    def take_error(self) -> str | None:
        """The last failure since this was asked before, or None."""
        with self._changed:
            error, self._error = self._error, None
            return error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                job, self._waiting = self._waiting, None
                self._writing = job
            assert job is not None
            try:
                self._write(job.path, job.state, job.progress)
                self._logged_error = None
            except Exception as error:  # noqa: BLE001 - the thread must outlive any failure
                self.note_error(str(error) if isinstance(error, MaceError) else f"{type(error).__name__}: {error}")
            with self._changed:
                job.state.is_leased = False
                self._writing = None
                self._changed.notify_all()
