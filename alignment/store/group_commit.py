"""Several threads' small writes, one fsync.

A durable commit costs one flush of the disk (2 to 4 ms on an SSD). Callers that arrive while a commit is running
wait, and the next one to get its turn writes for all of them. Nobody waits for company: a lone caller commits at
once.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from core.errors import StoreUnavailableError

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Ticket(Generic[Job, Result]):
    job: Job
    done: bool = False
    result: Result | None = None
    error: Exception | None = None


class GroupCommit(Generic[Job, Result]):
    """Runs `commit` on batches of jobs, one batch at a time. `commit` is all or nothing."""

    def __init__(self, commit: Callable[[Sequence[Job]], Sequence[Result]], max_jobs: int = 64) -> None:
        self._commit = commit
        self._max_jobs = max_jobs
        self._changed = threading.Condition()
        self._leading = False
        self._waiting: list[_Ticket[Job, Result]] = []

    def submit(self, job: Job) -> Result:
        """Return when `job` is committed; raise what `commit` raised for it."""
        ticket: _Ticket[Job, Result] = _Ticket(job)
        with self._changed:
            self._waiting.append(ticket)
        while not ticket.done:
            batch = self._take_turn(ticket)
            if batch:
                self._lead(batch)
        if ticket.error is not None:
            raise ticket.error
        return ticket.result  # type: ignore[return-value]  # set together with done

    def _take_turn(self, ticket: _Ticket[Job, Result]) -> list[_Ticket[Job, Result]]:
        """Wait until `ticket` is done (nothing to do) or until it is this thread's turn to write a batch."""
        with self._changed:
            self._changed.wait_for(lambda: ticket.done or not self._leading)
            if ticket.done:
                return []
            self._leading = True
            batch = self._waiting[: self._max_jobs]
            del self._waiting[: self._max_jobs]
            return batch

    def _lead(self, batch: list[_Ticket[Job, Result]]) -> None:
        try:
            self._run(batch)
        finally:
            with self._changed:  # undone ones: KeyboardInterrupt or the like; the next leader takes them
                self._waiting[:0] = [ticket for ticket in batch if not ticket.done]
                self._leading = False
                self._changed.notify_all()

    def _run(self, batch: list[_Ticket[Job, Result]]) -> None:
        try:
            results = self._commit([ticket.job for ticket in batch])
        except Exception as error:  # noqa: BLE001 - it belongs to the callers, who get it from `submit`
            if len(batch) > 1 and not isinstance(error, StoreUnavailableError):
                for ticket in batch:  # one bad job must not fail the others
                    self._run([ticket])
                return
            for ticket in batch:
                ticket.error, ticket.done = error, True
            return
        for ticket, result in zip(batch, results, strict=True):
            ticket.result, ticket.done = result, True
