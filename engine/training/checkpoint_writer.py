"""Writes training states to disk in a thread of its own, so that neither inference nor slices wait for the disk."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import MaceError
from engine.training.training_state import TrainingState, write_training_state

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""A write that takes longer is behind no more: training must not stand still for a disk that hangs."""

Write = Callable[[Path, TrainingState, dict[str, Any]], None]


@dataclass(slots=True)
class _Job:
    path: Path
    state: TrainingState
    progress: dict[str, Any]
    submitted_s: float = field(default_factory=time.monotonic)


class CheckpointWriter:
    """One write at a time; of the states that wait behind it only the newest is kept.

    A submitted state is leased (`is_leased`) until it is on disk or was overtaken. Failures are logged once and kept
    for `take_error`; nothing here raises because of a disk.
    """

    def __init__(self, write: Write = write_training_state) -> None:
        self._write = write
        self._changed = threading.Condition()
        self._writing: _Job | None = None
        self._waiting: _Job | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._logged_error: str | None = None

    def submit(self, path: Path, state: TrainingState, progress: dict[str, Any]) -> None:
        """Write a state as soon as the one before it is written. Whoever made it must not change it until then."""
        state.is_leased = True
        with self._changed:
            if self._waiting is not None:
                self._waiting.state.is_leased = False
            self._waiting = _Job(path, state, progress)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mace-checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def is_behind(self) -> bool:
        """Whether a state is still on its way to disk, and not for longer than `PATIENCE_S`."""
        with self._changed:
            oldest = self._writing or self._waiting
            return oldest is not None and time.monotonic() - oldest.submitted_s < PATIENCE_S

    def wait(self, timeout_s: float) -> bool:
        """Wait until every submitted state was written or has failed; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._writing is None and self._waiting is None, timeout_s)

    def note_error(self, message: str) -> None:
        """Remember a failure; logged unless it is the same as the last one."""
        with self._changed:
            self._error = message
            is_new = message != self._logged_error
            self._logged_error = message
        if is_new:
            logger.error("checkpoint failed, training goes on without it: %s", message)

    def take_error(self) -> str | None:
        """The last failure since this was asked before, or None."""
        with self._changed:
            error, self._error = self._error, None
            return error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                job, self._waiting = self._waiting, None
                self._writing = job
            assert job is not None
            try:
                self._write(job.path, job.state, job.progress)
                self._logged_error = None
            except MaceError as error:
                self.note_error(str(error))
            except Exception as error:  # noqa: BLE001 - the thread must outlive any failure
                self.note_error(f"{type(error).__name__}: {error}")
            with self._changed:
                job.state.is_leased = False
                self._writing = None
                self._changed.notify_all()
