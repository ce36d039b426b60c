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
    """AdamW and its state, and with them the copies below."""
    CHECKPOINT = "checkpoint"
    """The copy of a step's state, from which a failed step is undone and a checkpoint is written."""


@dataclass(frozen=True, slots=True)
class WorkCost:
    """One piece of work on one device."""

    seconds: float
    """From its start to its end; inference waits for most of it."""
    watts: float | None
    """Power of the whole machine over idle meanwhile; None: no sensors see CPU and GPU."""
