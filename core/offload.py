"""Background work that can run beside the engine's device, and what it costs on either."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Offload = Literal["auto", "never", "always"]
"""Whether work moves to the CPU."""
Place = Literal["engine", "cpu"]
"""The engine's device, or the CPU beside it."""


class WorkKind(StrEnum):
    """Kinds of background work that can be moved."""

    OPTIMIZER = "optimizer"
    """AdamW, its state, and the copies of both that a checkpoint is written from."""


@dataclass(frozen=True, slots=True)
class WorkCost:
    """One piece of work on one device."""

    seconds: float
    """From its start to its end; inference waits for it."""
    watts: float | None
    """Power of the whole machine over idle meanwhile; None: there is no sensor."""
