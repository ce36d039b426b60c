"""What happened to adapter versions after they were written: one JSON line each in `activations.jsonl`, append-only.

A line is on disk before the pointer that it announces moves. A line that a crash tore is ignored, and the next one
starts on a line of its own.
"""

import os
import threading
from collections import deque
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from core.files import sync

LOG_FILE = "activations.jsonl"
BASE = "base"
"""Stands for the bare base model where a version is named."""

Event = Literal["activated", "held", "canary", "rolled_back", "released", "retired", "deleted"]
"""`held`: passed the gate, but a pin kept it from going live. `retired`: its name is gone, its files follow."""
Actor = Literal["gate", "api", "canary", "recovery", "retention"]

_MAX_ENTRIES = 10_000
"""Newest entries kept in memory; the file has them all."""


class Activation(BaseModel):
    """One line. Unknown keys are dropped, so that an older MACE can read what a newer one wrote."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    time: float
    """Unix seconds."""
    event: Event
    version: str
    """`v000N` or `base`."""
    previous: str | None = None
    """What was live before (`v000N` or `base`)."""
    by: Actor
    reason: str = ""
    pinned: bool = False


class ActivationLog:
    """One file. `append` needs a lock among writers, which the caller holds; `read` needs none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: deque[Activation] = deque(maxlen=_MAX_ENTRIES)
        self._offset = 0
        self._reading = threading.Lock()

    def append(self, entry: Activation) -> None:
        """Write one line; on disk on return.

        Raises:
            OSError: it could not be written; the log is as before.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            line = (b"\n" if torn else b"") + entry.model_dump_json().encode() + b"\n"
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError("the disk took a part of the line only")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if size == 0:
            sync(self.path.parent)

    def read(self) -> tuple[Activation, ...]:
        """The newest entries, oldest first. Only what was appended since the last call is read.

        Raises:
            OSError: the file cannot be read.
        """
        with self._reading:
            try:
                with self.path.open("rb") as file:
                    if os.fstat(file.fileno()).st_size < self._offset:  # replaced by hand: start again
                        self._offset = 0
                        self._entries.clear()
                    file.seek(self._offset)
                    new = file.read()
            except FileNotFoundError:
                return ()
            complete = new[: new.rfind(b"\n") + 1]  # the rest is torn, or being written
            self._offset += len(complete)
            for line in filter(None, complete.split(b"\n")):
                try:
                    self._entries.append(Activation.model_validate_json(line))
                except ValidationError:
                    continue
            return tuple(self._entries)

    def of(self, version: str) -> tuple[Activation, ...]:
        """Entries about one version, oldest first; OSError as for `read`."""
        return tuple(entry for entry in self.read() if entry.version == version)
