"""Seams between packages, as Protocols."""

from typing import Any, Protocol

from core.messages import BatchOutcome, Headroom, TrainingBatch, TrainingPair


class ControlPort(Protocol):
    """What an executor needs of Control. Every call may raise `ControlUnavailableError`; serving must go on."""

    async def poll(self, headroom: Headroom) -> TrainingBatch | None:
        """Work for this executor, if any is due."""
        ...

    async def complete(self, outcome: BatchOutcome, version: str | None) -> None:
        """Report a batch; returns when it is committed."""
        ...

    async def held_out_pairs(self) -> list[TrainingPair]:
        """The gate's test set."""
        ...

    async def stats(self) -> dict[str, Any]:
        """Queue, store and drift."""
        ...
