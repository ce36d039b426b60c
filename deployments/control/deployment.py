"""Control: the one-replica deployment that hosts the CentralScheduler and DriftMonitor actors.

Serve restarts it when it dies; its actors die with it and are made anew, from the store on disk. Nothing here is
on the token path: executors serve on while Control is away, and repeat their calls.
"""

import logging
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

from core.config import AppArgs
from core.errors import MaceError
from core.wire import BatchOutcome
from deployments.control.central_scheduler import CentralScheduler
from deployments.control.drift_monitor import DriftMonitor

logger = logging.getLogger(__name__)

_MONITOR_THREADS = 32
_TIMEOUT_S = 30.0


class _QueueHandle:
    """The scheduler as the monitor calls it: each method blocks until the actor has answered."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # pickle looks for some of its own
            raise AttributeError(name)
        method = getattr(self._actor, name)
        return lambda *args: ray.get(method.remote(*args), timeout=_TIMEOUT_S)


class Control:
    """Owner of the two actors."""

    def __init__(self, config: AppArgs) -> None:
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0}
        self._scheduler = ray.remote(CentralScheduler).options(**options).remote(config)
        threads = {**options, "max_concurrency": _MONITOR_THREADS}
        self._monitor = ray.remote(DriftMonitor).options(**threads).remote(config, _QueueHandle(self._scheduler))
        self._actors = {CentralScheduler.__name__: self._scheduler, DriftMonitor.__name__: self._monitor}
        self._monitor.start.remote()

    async def check_health(self) -> None:
        """Fails if the monitor cannot be restarted; Serve then replaces the replica. A restarted one streams again."""
        await self._monitor.start.remote()

    async def ask(self, actor: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the actor of that class name; `deployments.control.client` lists who calls what.

        A refusal comes back as a value, since Serve logs the traceback of whatever is raised here.
        """
        try:
            return await getattr(self._actors[actor], method).remote(*args, **kwargs)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MaceError):
                logger.info("%s was refused: %s: %s", method, type(error.cause).__name__, error.cause)
                return error.cause
            raise
        except ray.exceptions.RayActorError:
            self._monitor.stream_soon.remote()  # if it was the scheduler, its successor has an empty queue
            raise

    async def complete(self, outcome: BatchOutcome, version: str | None) -> None:
        """Record what became of a batch: first durably, then in the queue, so that no pair is streamed twice.

        `version` is what was live on the executor meanwhile.
        """
        failed = await self._scheduler.failed_for_good.remote(outcome)
        await self._monitor.record.remote(outcome, failed, version)
        await self._scheduler.complete.remote(outcome)
        self._monitor.stream_soon.remote()  # there is room for more, and what was found may call for it

    async def stats(self) -> dict[str, Any]:
        """Queue, store and drift, for `/v1/training`."""
        queue = self._scheduler.stats.remote()
        monitor = self._monitor.stats.remote()
        return {"queue": await queue, **await monitor}
