"""What a learner must know to go on after a restart: it travels in the header of each training checkpoint.

A checkpoint is written after every optimizer step by the worker, atomically. Replicas on one state directory each
claim a file of their own; the kernel gives it back when the replica dies.
"""

import fcntl
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from core.errors import AdapterError

_MAX_REPLICAS = 1024


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """State of the shadow adapter in words."""

    base: str = "base"
    """Version that the shadow adapter was trained on from: `v000N`, or `base` for the bare model."""
    instead_of: str = ""
    """The last good state, if training went back to an ancestor of it because too many candidates were refused."""
    total_steps: int = 0
    """Optimizer steps since the first one on this state directory; never goes back."""
    steps_since_candidate: int = 0
    candidate_pairs: tuple[str, ...] = field(default=())
    """Ids of the pairs trained on since `base`."""

    @property
    def goal(self) -> str:
        """The last good state, which training goes on from: `base` itself unless that is an ancestor of it."""
        return self.instead_of or self.base

    def after_step(self, pair_ids: Iterable[str]) -> "TrainingProgress":
        """What holds once one more step on these pairs is done."""
        return replace(
            self,
            total_steps=self.total_steps + 1,
            steps_since_candidate=self.steps_since_candidate + 1,
            candidate_pairs=tuple(dict.fromkeys((*self.candidate_pairs, *pair_ids))),
        )

    def from_version(self, version: str, instead_of: str = "") -> "TrainingProgress":
        """The shadow adapter is that version now, and nothing has been learnt since."""
        return TrainingProgress(base=version, instead_of=instead_of, total_steps=self.total_steps)

    def to_wire(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> "TrainingProgress":
        """Inverse of `to_wire`; what is missing or odd counts as nothing known.

        Raises:
            ValueError: a number is not a number.
        """
        return cls(
            base=str(data.get("base", "")),
            instead_of=str(data.get("instead_of", "")),
            total_steps=int(data.get("total_steps", 0)),
            steps_since_candidate=int(data.get("steps_since_candidate", 0)),
            candidate_pairs=tuple(map(str, data.get("candidate_pairs", ()))),
        )


class CheckpointSlot:
    """The checkpoint file of one replica: `checkpoint.safetensors`, and `checkpoint-1` and so on for further ones."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor: int | None = None
        self.path = directory / "checkpoint.safetensors"

    def claim(self) -> Path:
        """Take the first file that no living replica has.

        Raises:
            AdapterError: the directory cannot be written.
        """
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for number in range(_MAX_REPLICAS):
                name = "checkpoint" if number == 0 else f"checkpoint-{number}"
                descriptor = os.open(self._directory / f".{name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                    continue
                self._descriptor = descriptor
                self.path = self._directory / f"{name}.safetensors"
                return self.path
        except OSError as error:
            raise AdapterError(f"no checkpoint can be kept in {self._directory}: {error}") from error
        raise AdapterError(f"{_MAX_REPLICAS} replicas have a checkpoint in {self._directory}")

    def release(self) -> None:
        """Give the file back; the end of the process does it too."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
