"""Control as executors and routes see it: each call goes to the actor that answers it, and foreign errors become ours.

A line of `ControlClient` names the method of the `CentralScheduler` or the `DriftMonitor` that answers; arguments,
result and documentation are that method's. The modules of the actors are read by the type checker only: an executor
does without the store that is behind them.
"""

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import ray.exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from core.errors import ControlUnavailableError, MaceError
from core.wire import BatchOutcome, Headroom
from deployments.monitors.metrics import Meter

if TYPE_CHECKING:
    from deployments.control.central_scheduler import CentralScheduler
    from deployments.control.drift_monitor import DriftMonitor
else:

    class _Methods:
        """Stands for an actor's class, and has methods of every name."""

        def __init__(self, actor: str) -> None:
            self._actor = actor

        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(__qualname__=f"{self._actor}.{name}")

    CentralScheduler, DriftMonitor = _Methods("CentralScheduler"), _Methods("DriftMonitor")

P = ParamSpec("P")
T = TypeVar("T")
_CALL_TIMEOUT_S = 30.0
_IMPORT_TIMEOUT_S = 600.0


def _ask(
    method: Callable[Concatenate[Any, P], T], timeout_s: float = _CALL_TIMEOUT_S
) -> Callable[Concatenate["ControlClient", P], Coroutine[Any, Any, T]]:
    """A call of an actor's method through Control."""
    actor, name = method.__qualname__.split(".")

    async def call(self: "ControlClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer: T = await self._call(name, "ask", actor, name, args, kwargs, timeout_s=timeout_s)
        return answer

    return call


class ControlClient:
    """Implements `core.ports.ControlPort` and the calls of the routes over a Serve deployment handle.

    Every method raises `ControlUnavailableError` while Control is down or restarting, and the `MaceError` of the
    other side as it was raised there.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._meter = Meter("executor")

    poll = _ask(CentralScheduler.poll)
    heartbeat = _ask(CentralScheduler.heartbeat)
    add_feedback = _ask(DriftMonitor.add_feedback)
    import_feedback = _ask(DriftMonitor.import_feedback, _IMPORT_TIMEOUT_S)
    feedback_page = _ask(DriftMonitor.feedback_page)
    export_chunk = _ask(DriftMonitor.export_chunk)
    put_responses = _ask(DriftMonitor.put_responses)
    rating_counts = _ask(DriftMonitor.rating_counts)
    held_out_pairs = _ask(DriftMonitor.held_out_pairs)
    note_live = _ask(DriftMonitor.note_live)
    begin_rebuild = _ask(DriftMonitor.begin_rebuild)
    relearning_pairs = _ask(DriftMonitor.relearning_pairs)
    note_rebuild = _ask(DriftMonitor.note_rebuild)
    drift = _ask(DriftMonitor.drift)

    async def wait_for_work(self, headroom: Headroom, limit_s: float) -> bool:
        """See `CentralScheduler.wait_for_work`."""
        args = (headroom, limit_s)
        return bool(await self._call("wait_for_work", "ask", "CentralScheduler", "wait_for_work", args, {}))

    async def complete(self, outcome: BatchOutcome, version: str | None) -> None:
        """See `Control.complete`."""
        await self._call("complete", "complete", outcome, version)

    async def stats(self) -> dict[str, Any]:
        """Queue, store and drift, from both actors at once."""
        answer: dict[str, Any] = await self._call("stats", "stats")
        return answer

    async def _call(self, name: str, method: str, *args: Any, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        try:
            response = getattr(self._handle, method).remote(*args)
            answer = await asyncio.wait_for(response, timeout_s)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            while isinstance(cause, ray.exceptions.RayTaskError):  # replica and actor each wrap once
                cause = cause.cause
            if isinstance(cause, MaceError):
                raise cause from None
            raise self._unavailable(name, error) from error
        except (
            ray.exceptions.RayError,
            RayServeException,
            BackPressureError,
            DeploymentUnavailableError,
            TimeoutError,
        ) as error:
            raise self._unavailable(name, error) from error
        if isinstance(answer, MaceError):
            raise answer
        return answer

    def _unavailable(self, name: str, error: Exception) -> ControlUnavailableError:
        self._meter.count("control_unreachable", method=name)
        return ControlUnavailableError(f"Control did not answer {name}: {type(error).__name__}: {error}")
