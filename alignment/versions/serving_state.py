"""The pointers beside the versions: which one answers for the model, and who decided that.

::

    live      name of the live version; missing or empty: the bare base model
    pin       what was live when it was pinned, `base` or `v000N`; missing or empty: not pinned
    canary    the version on trial with a share of the traffic; missing or empty: none
    retired   versions about to be deleted, each with the time since when nobody uses it
    activations.jsonl   every change, one JSON line each, append-only

The pointer `live` is the truth. Every change is logged on disk before the pointer moves; `reconcile` adds what a crash
in between left out. A line that a crash tore is ignored, and the next one starts on a line of its own.
All executors on one state directory share these files and poll them; a kernel lock makes them one writer.
"""

import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from alignment.versions.adapter_files import version_number
from core.errors import AdapterError
from core.files import sync, write_atomically

LIVE_FILE = "live"
PIN_FILE = "pin"
CANARY_FILE = "canary"
RETIRED_FILE = "retired"
_LOG_FILE = "activations.jsonl"
_LOCK_FILE = ".lock"
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
    """The version that was live before (`v000N` or `base`)."""
    by: Actor
    reason: str = ""
    pinned: bool = False


class ActivationLog:
    """One file. `append` needs a lock among writers, which the caller holds; `read` needs none.

    Disk errors are `OSError`; if `append` fails, the log is as before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: deque[Activation] = deque(maxlen=_MAX_ENTRIES)
        self._offset = 0
        self._reading = threading.Lock()

    def append(self, entry: Activation) -> None:
        """Write one line; on disk on return."""
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
        """The newest entries, oldest first. Only what was appended since the last call is read."""
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


@dataclass(frozen=True, slots=True)
class Serving:
    """The pointers at one moment."""

    live: str | None = None
    """None is the bare base model."""
    pinned: str | None = None
    """`base` or a version: nothing but the API moves `live`. None: not pinned."""
    canary: str | None = None
    retired: Mapping[str, float] = field(default_factory=dict)
    """Unix seconds when each was last known to be in use."""

    @property
    def training_base(self) -> str | None:
        """The version that training goes on from: the canary while there is one, as it will be live if it is good."""
        return self.canary or self.live


class ServingState:
    """The pointers in one directory. `check` raises an AdapterError for a version that must not answer.

    Disk errors are `AdapterError`; then nothing moved.
    """

    def __init__(self, root: Path, check: Callable[[str], None], clock: Callable[[], float] = time.time) -> None:
        self._root = root
        self._check = check
        self._clock = clock
        self.log = ActivationLog(root / _LOG_FILE)

    def read(self) -> Serving:
        """All pointers, unchecked. Four small reads: made for polling."""
        return Serving(
            live=self.pointer(LIVE_FILE) or None,
            pinned=self.pointer(PIN_FILE) or None,
            canary=self.pointer(CANARY_FILE) or None,
            retired=_parse_retired(self.pointer(RETIRED_FILE)),
        )

    def activations(self) -> tuple[Activation, ...]:
        """Every change so far, oldest first."""
        try:
            return self.log.read()
        except OSError as error:
            raise AdapterError(f"cannot read {self.log.path}: {error}") from error

    def rolled_back(self) -> dict[str, str]:
        """Canaries that failed and were not made live by hand since, with the reason."""
        failed: dict[str, str] = {}
        for entry in self.activations():
            if entry.event == "rolled_back":
                failed[entry.version] = entry.reason
            elif entry.event == "activated":
                failed.pop(entry.version, None)
        return failed

    def canary_since_s(self) -> float | None:
        """Unix seconds at which the trial in progress began; None if there is none."""
        name = self.pointer(CANARY_FILE)
        started = [entry.time for entry in self.activations() if entry.event == "canary" and entry.version == name]
        return started[-1] if started else None

    def activate(
        self, name: str | None, *, by: Actor = "api", reason: str = "", pin: bool = False, over: str | None = None
    ) -> bool:
        """Make a version live (None: the bare base model), pinned or not. A pointer move, durable on return.

        Ends a canary: the trial of another version than `name` counts as failed. `over` is what the gate compared it
        with (`base` or a version); None: nothing in particular.

        Returns False if a pin, the end of its trial, or a live version that it was not compared with keeps `by` gate or
        canary from it; then nothing moved.
        """
        if name is not None:
            self._check(name)
        with self._writing("move the live pointer"):
            before = self.read()
            if by == "gate" and (obstacle := _obstacle(before, over)):
                self._note("held", name, by, f"{obstacle}. {reason}".strip(), before)
                return False
            if by == "canary" and before.canary != name:
                return False
            if before.canary not in (None, name):
                why = f"{name or BASE} was made live during the trial"
                self._note("rolled_back", before.canary, by, why, before)
            self._note("activated", name, by, reason, before, pinned=pin)
            if pin:  # in this order a crash in between leaves a pin rather than none
                self._write(PIN_FILE, name or BASE)
            self._write(LIVE_FILE, name or "")
            if not pin and before.pinned is not None:
                self._write(PIN_FILE, "")
            if before.canary is not None:
                self._write(CANARY_FILE, "")
            self._keep_retired({key: at for key, at in before.retired.items() if key != name}, before)
        return True

    def release_pin(self, reason: str = "") -> bool:
        """Let the gate move the live pointer again; False if nothing was pinned."""
        with self._writing("release the pin"):
            before = self.read()
            if before.pinned is None:
                return False
            self._note("released", before.pinned, "api", reason, before)
            self._write(PIN_FILE, "")
            return True

    def start_canary(self, name: str, reason: str = "", over: str | None = None) -> bool:
        """Put a version on trial; False if a pin, another trial or a live version that is not `over` keeps it back."""
        self._check(name)
        with self._writing("start a canary"):
            before = self.read()
            obstacle = _obstacle(before, over) or (before.canary and f"{before.canary} is on trial")
            if obstacle:
                self._note("held", name, "gate", f"{obstacle}. {reason}".strip(), before)
                return False
            self._note("canary", name, "gate", reason, before)
            self._write(CANARY_FILE, name)
            return True

    def roll_back(self, name: str, *, reason: str) -> bool:
        """End the trial of a version that failed it; False if it is not on trial (any more)."""
        with self._writing("end a canary"):
            before = self.read()
            if before.canary != name:
                return False
            self._note("rolled_back", name, "canary", reason, before)
            self._write(CANARY_FILE, "")
            return True

    def retire(self, names: Collection[str], in_use: Collection[str] = ()) -> Serving:
        """Mark versions for deletion, and renew the time of marked ones `in_use`. Those that serve are never marked."""
        with self._writing("retire versions"):
            before = self.read()
            serving = {before.live, before.pinned, before.canary}
            now = self._clock()
            kept = {name: now if name in in_use else at for name, at in before.retired.items()}
            kept |= {name: now for name in names if name not in kept}
            kept = {name: at for name, at in kept.items() if name not in serving}
            for name in sorted(kept.keys() - before.retired.keys()):
                self._note("retired", name, "retention", "more versions than versions.keep", before)
            self._keep_retired(kept, before)
            return self.read()

    def forget_retired(self, name: str) -> None:
        """Note that a retired version was deleted. The caller holds the lock (`one_writer`)."""
        before = self.read()
        self._note("deleted", name, "retention", "", before)
        self._keep_retired({key: at for key, at in before.retired.items() if key != name}, before)

    def reconcile(self) -> None:
        """Repair what a crash left: the log gets the live pointer's word, a pin follows it, a lost canary ends."""
        with self._writing("check the live pointer"):
            now = self.read()
            entries = [entry for entry in self.activations() if entry.event == "activated"]
            logged = entries[-1].version if entries else BASE
            if logged != (now.live or BASE):
                reason = f"the log said {logged}, the live pointer did not"
                self._note("activated", now.live, "recovery", reason, now, pinned=now.pinned is not None)
            if now.pinned not in (None, now.live or BASE):
                self._write(PIN_FILE, now.live or BASE)
            if now.canary is None:
                return
            try:
                self._check(now.canary)
            except AdapterError:
                self._note("rolled_back", now.canary, "recovery", "it cannot be used any more", now)
                self._write(CANARY_FILE, "")

    def pointer(self, name: str) -> str:
        """Text of a pointer file; empty if there is none."""
        try:
            return (self._root / name).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterError(f"cannot read {self._root / name}: {error}") from error

    def _note(
        self, event: Event, version: str | None, by: Actor, reason: str, before: Serving, *, pinned: bool = False
    ) -> None:
        names = {"version": version or BASE, "previous": before.live or BASE}
        self.log.append(Activation(time=self._clock(), event=event, by=by, reason=reason, pinned=pinned, **names))

    def _write(self, name: str, text: str) -> None:
        write_atomically(self._root / name, f"{text}\n")

    def _keep_retired(self, retired: Mapping[str, float], before: Serving) -> None:
        if retired != before.retired:
            self._write(RETIRED_FILE, "\n".join(f"{name} {at:.3f}" for name, at in sorted(retired.items())))

    @contextmanager
    def _writing(self, purpose: str) -> Iterator[None]:
        try:
            with one_writer(self._root):
                yield
        except OSError as error:
            raise AdapterError(f"cannot {purpose} in {self._root}: {error}") from error


@contextmanager
def one_writer(root: Path) -> Iterator[None]:
    """Lock out all other threads and processes that use this directory; the kernel unlocks it if the holder dies."""
    descriptor = os.open(root / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _parse_retired(text: str) -> dict[str, float]:
    retired = {}
    for line in text.splitlines():
        name, _, at = line.partition(" ")
        if version_number(name) is not None and at.replace(".", "", 1).isdigit():
            retired[name] = float(at)
    return retired


def _obstacle(serving: Serving, over: str | None) -> str | None:
    """The obstacle that keeps a version which passed the gate, compared with `over`, from the traffic, in words."""
    if serving.pinned is not None:
        return f"{serving.pinned} is pinned"
    live = serving.live or BASE
    return None if over in (None, live) else f"it was compared with {over}, and {live} is live now"
