"""Control: the one-replica deployment that hosts the CentralScheduler and DriftMonitor actors.

Serve restarts it when it dies; its actors die with it and are made anew, from the store on disk. Nothing here is
on the token path: executors serve on while Control is away, and repeat their calls.
"""

from typing import Any

import ray

from alignment.records.pairs import StoredResponse
from alignment.store.formats import ExportFormat
from core.wire import BatchOutcome, Headroom, HeldOutPairs, TrainingBatch, TrainingPair
from deployments.control.central_scheduler import CentralScheduler
from deployments.control.drift_monitor import DriftMonitor

_MONITOR_THREADS = 8
_TIMEOUT_S = 30.0


class _QueueProxy:
    """The scheduler actor as the monitor sees it: blocking calls."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def known_pair_ids(self) -> dict[str, list[str]]:
        return dict(ray.get(self._actor.known_pair_ids.remote(), timeout=_TIMEOUT_S))

    def enqueue(self, pairs: list[TrainingPair]) -> None:
        ray.get(self._actor.enqueue.remote(pairs), timeout=_TIMEOUT_S)

    def withdraw(self, pair_ids: list[str]) -> int:
        return int(ray.get(self._actor.withdraw.remote(pair_ids), timeout=_TIMEOUT_S))

    def enqueue_scoring(self, pairs: list[TrainingPair]) -> None:
        ray.get(self._actor.enqueue_scoring.remote(pairs), timeout=_TIMEOUT_S)

    def set_gamma(self, gamma: float) -> None:
        ray.get(self._actor.set_gamma.remote(gamma), timeout=_TIMEOUT_S)


class Control:
    """Owner of the two actors; forwards calls to them."""

    def __init__(self, args: dict[str, Any]) -> None:
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0}
        self._scheduler = ray.remote(CentralScheduler).options(**options).remote(args)
        self._monitor = (
            ray.remote(DriftMonitor)
            .options(**options, max_concurrency=_MONITOR_THREADS)
            .remote(args, _QueueProxy(self._scheduler))
        )

        self._monitor.start.remote()

    async def check_health(self) -> None:
        """Fails if the monitor cannot be restarted; Serve then replaces the replica. A restarted one streams again."""
        await self._monitor.start.remote()

    async def add_feedback(self, items: list[object], idempotency_key: str | None) -> list[dict[str, Any]]:
        """See `DriftMonitor.add_feedback`."""
        return await self._monitor.add_feedback.remote(items, idempotency_key)

    async def import_feedback(self, body: bytes) -> dict[str, Any]:
        """See `DriftMonitor.import_feedback`."""
        return await self._monitor.import_feedback.remote(body)

    async def feedback_page(self, after: str | None, limit: int, kind: str | None) -> dict[str, Any]:
        """See `DriftMonitor.feedback_page`."""
        return await self._monitor.feedback_page.remote(after, limit, kind)

    async def export_chunk(self, format: ExportFormat, after: int) -> tuple[list[dict[str, Any]], int | None]:
        """See `DriftMonitor.export_chunk`."""
        return await self._monitor.export_chunk.remote(format, after)

    async def put_responses(self, responses: list[StoredResponse]) -> int:
        """See `DriftMonitor.put_responses`."""
        return await self._monitor.put_responses.remote(responses)

    async def held_out_pairs(self) -> HeldOutPairs:
        """See `DriftMonitor.held_out_pairs`."""
        return await self._monitor.held_out_pairs.remote()

    async def note_live(self, version: str) -> None:
        """See `DriftMonitor.note_live`."""
        await self._monitor.note_live.remote(version)

    async def drift(self, limit: int, stream: str | None) -> dict[str, Any]:
        """See `DriftMonitor.drift`."""
        return await self._monitor.drift.remote(limit, stream)

    async def rating_counts(self, since_s: float) -> dict[str | None, tuple[int, int]]:
        """See `DriftMonitor.rating_counts`."""
        return await self._monitor.rating_counts.remote(since_s)

    async def poll(self, headroom: Headroom) -> TrainingBatch | None:
        """See `CentralScheduler.poll`."""
        return await self._scheduler.poll.remote(headroom)

    async def heartbeat(self, executor_id: str) -> None:
        """See `CentralScheduler.heartbeat`."""
        await self._scheduler.heartbeat.remote(executor_id)

    async def complete(self, outcome: BatchOutcome, version: str | None) -> None:
        """Record what became of a batch: first durably, then in the queue, so that no pair is streamed twice."""
        failed = await self._scheduler.failed_for_good.remote(outcome)
        await self._monitor.record.remote(outcome, failed, version)
        await self._scheduler.complete.remote(outcome)

    async def stats(self) -> dict[str, Any]:
        """Queue, store and drift."""
        queue = self._scheduler.stats.remote()
        monitor = self._monitor.stats.remote()
        return {"queue": await queue, **await monitor}
