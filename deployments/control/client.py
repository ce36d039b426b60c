"""Control as executors and routes see it: Serve handle calls with foreign errors mapped to ours."""

import asyncio
from typing import Any

import ray.exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from core.errors import ControlUnavailableError, MaceError
from core.wire import BatchOutcome, Headroom, HeldOutPairs, TrainingBatch
from deployments.monitors.metrics import Meter

_CALL_TIMEOUT_S = 30.0


class ControlClient:
    """Implements `core.ports.ControlPort` and the feedback calls over a Serve deployment handle.

    Every method raises `ControlUnavailableError` while Control is down or restarting, and the `MaceError` of the
    other side as it was raised there.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._meter = Meter("executor")

    async def add_feedback(self, items: list[object], idempotency_key: str | None) -> list[dict[str, Any]]:
        """Store feedback; outcomes are committed when this returns."""
        return await self._call("add_feedback", items, idempotency_key)

    async def import_feedback(self, body: bytes) -> dict[str, Any]:
        """Store a JSONL body."""
        return await self._call("import_feedback", body, timeout_s=600.0)

    async def feedback_page(self, after: str | None, limit: int, kind: str | None) -> dict[str, Any]:
        """A stretch of the stored items."""
        return await self._call("feedback_page", after, limit, kind)

    async def export_chunk(self, format: str, after: int) -> tuple[list[dict[str, Any]], int | None]:
        """A stretch of the export and where to go on; None at the end."""
        return await self._call("export_chunk", format, after)

    async def put_responses(self, responses: list[Any]) -> int:
        """Remember responses."""
        return await self._call("put_responses", responses)

    async def held_out_pairs(self) -> HeldOutPairs:
        """The gate's test set."""
        return await self._call("held_out_pairs")

    async def note_live(self, version: str) -> None:
        """Which version is live here."""
        await self._call("note_live", version)

    async def drift(self, limit: int, stream: str | None) -> dict[str, Any]:
        """Drift streams, what follows from them, and the newest events."""
        return await self._call("drift", limit, stream)

    async def rating_counts(self, since_s: float) -> dict[str | None, tuple[int, int]]:
        """Thumbs up and down by adapter version."""
        return await self._call("rating_counts", since_s)

    async def poll(self, headroom: Headroom) -> TrainingBatch | None:
        """Work for this executor, if any is due."""
        return await self._call("poll", headroom)

    async def heartbeat(self, executor_id: str) -> None:
        """Say that this executor still works on its batch."""
        await self._call("heartbeat", executor_id)

    async def complete(self, outcome: BatchOutcome, version: str | None) -> None:
        """Report a batch."""
        await self._call("complete", outcome, version)

    async def stats(self) -> dict[str, Any]:
        """Queue, store and drift."""
        return await self._call("stats")

    async def _call(self, method: str, *args: Any, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        try:
            response = getattr(self._handle, method).remote(*args)
            return await asyncio.wait_for(response, timeout_s)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            while isinstance(cause, ray.exceptions.RayTaskError):  # replica and actor each wrap once
                cause = cause.cause
            if isinstance(cause, MaceError):
                raise cause from None
            raise self._unavailable(method, error) from error
        except (
            ray.exceptions.RayError,
            RayServeException,
            BackPressureError,
            DeploymentUnavailableError,
            TimeoutError,
        ) as error:
            raise self._unavailable(method, error) from error

    def _unavailable(self, method: str, error: Exception) -> ControlUnavailableError:
        self._meter.count("control_unreachable", method=method)
        return ControlUnavailableError(f"Control did not answer {method}: {type(error).__name__}: {error}")
