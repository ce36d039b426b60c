"""Control: the one-replica deployment that hosts the CentralScheduler and DriftMonitor actors.

Serve restarts it when it dies; its actors die with it and are made anew, from the store on disk. Nothing here is
on the token path: executors serve on while Control is away, and repeat their calls.
"""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray

from core.config import AppArgs
from core.wire import BatchOutcome
from deployments.control.central_scheduler import CentralScheduler
from deployments.control.drift_monitor import DriftMonitor

P = ParamSpec("P")
T = TypeVar("T")
_MONITOR_THREADS = 8
_TIMEOUT_S = 30.0


def _blocking(
    method: Callable[Concatenate[CentralScheduler, P], T],
) -> Callable[Concatenate["_QueueHandle", P], T]:
    def call(self: "_QueueHandle", /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer: T = ray.get(getattr(self.actor, method.__name__).remote(*args, **kwargs), timeout=_TIMEOUT_S)
        return answer

    return call


class _QueueHandle:
    """The scheduler actor as the monitor's `FineTuneQueue`: each call blocks until the actor has answered."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    known_pair_ids = _blocking(CentralScheduler.known_pair_ids)
    enqueue = _blocking(CentralScheduler.enqueue)
    withdraw = _blocking(CentralScheduler.withdraw)
    enqueue_scoring = _blocking(CentralScheduler.enqueue_scoring)
    set_gamma = _blocking(CentralScheduler.set_gamma)


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
        """Call a method of the actor of that class name; `deployments.control.client` lists who calls what."""
        return await getattr(self._actors[actor], method).remote(*args, **kwargs)

    async def complete(self, outcome: BatchOutcome, version: str | None) -> None:
        """Record what became of a batch: first durably, then in the queue, so that no pair is streamed twice.

        `version` is what was live on the executor meanwhile.
        """
        failed = await self._scheduler.failed_for_good.remote(outcome)
        await self._monitor.record.remote(outcome, failed, version)
        await self._scheduler.complete.remote(outcome)

    async def stats(self) -> dict[str, Any]:
        """Queue, store and drift, for `/v1/training`."""
        queue = self._scheduler.stats.remote()
        monitor = self._monitor.stats.remote()
        return {"queue": await queue, **await monitor}
