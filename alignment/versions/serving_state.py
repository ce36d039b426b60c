"""Which adapter version answers for the model, and who decided that: the pointers beside the versions.

::

    live      name of the live version; missing or empty: the bare base model
    pin       what was live when it was pinned, `base` or `v000N`; missing or empty: not pinned
    canary    the version on trial with a share of the traffic; missing or empty: none
    retired   versions about to be deleted, each with the time since when nobody uses it
    activations.jsonl   every change, see `alignment.versions.activation_log`

The pointer `live` is the truth. Every change is logged first; `reconcile` adds what a crash in between left out.
All executors on one state directory share these files and poll them; a kernel lock makes them one writer.
"""

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from alignment.versions.activation_log import BASE, LOG_FILE, Activation, ActivationLog, Actor, Event
from alignment.versions.adapter_files import version_number
from core.errors import AdapterError
from core.files import write_atomically

LIVE_FILE = "live"
PIN_FILE = "pin"
CANARY_FILE = "canary"
RETIRED_FILE = "retired"
_LOCK_FILE = ".lock"


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
        """What training goes on from: the canary while there is one, as it will be live if it is good."""
        return self.canary or self.live


class ServingState:
    """The pointers in one directory. `check` raises an AdapterError for a version that must not answer.

    Disk errors are `AdapterError`; then nothing moved.
    """

    def __init__(self, root: Path, check: Callable[[str], None], clock: Callable[[], float] = time.time) -> None:
        self._root = root
        self._check = check
        self._clock = clock
        self.log = ActivationLog(root / LOG_FILE)

    def read(self) -> Serving:
        """All pointers, unchecked. Four small reads: made for polling."""
        return Serving(
            live=self.pointer(LIVE_FILE) or None,
            pinned=self.pointer(PIN_FILE) or None,
            canary=self.pointer(CANARY_FILE) or None,
            retired=_parse_retired(self.pointer(RETIRED_FILE)),
        )

    def activations(self) -> tuple[Activation, ...]:
        """What happened so far, oldest first."""
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
        """When the trial in progress began (Unix seconds); None if there is none."""
        name = self.pointer(CANARY_FILE)
        started = [entry.time for entry in self.activations() if entry.event == "canary" and entry.version == name]
        return started[-1] if started else None

    def activate(
        self,
        name: str | None,
        *,
        by: Actor = "api",
        reason: str = "",
        pin: bool = False,
        over: str | None = None,
    ) -> bool:
        """Make a version live (None: the bare base model), pinned or not. A pointer move, durable on return.

        Ends a canary: the trial of another version than `name` counts as failed.

        Args:
            name: the version.
            by: who decided.
            reason: for the lineage.
            pin: nothing but the API may move on from it.
            over: the gate compared it with this one (`base` or a version); None: with nothing in particular.

        Returns:
            False if a pin, the end of its trial, or a live version that it was not compared with keeps `by` gate or
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
                self._note(
                    "rolled_back", before.canary, by, f"{name or BASE} was made live during the trial", before
                )
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

    def roll_back(self, name: str, *, by: Actor = "canary", reason: str) -> bool:
        """End the trial of a version that failed it; False if it is not on trial (any more)."""
        with self._writing("end a canary"):
            before = self.read()
            if before.canary != name:
                return False
            self._note("rolled_back", name, by, reason, before)
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
        """A retired version was deleted. The caller holds the lock (`one_writer`)."""
        before = self.read()
        self._note("deleted", name, "retention", "", before)
        self._keep_retired({key: at for key, at in before.retired.items() if key != name}, before)

    def reconcile(self) -> None:
        """After a crash: the log gets the live pointer's last word, a pin names what is live, a lost canary ends."""
        with self._writing("check the live pointer"):
            now = self.read()
            entries = [entry for entry in self.activations() if entry.event == "activated"]
            logged = entries[-1].version if entries else BASE
            if logged != (now.live or BASE):
                reason = f"the log said {logged}, the live pointer did not"
                self._note("activated", now.live, "recovery", reason, now, pinned=now.pinned is not None)
            if now.pinned not in (None, now.live or BASE):
                self._write(PIN_FILE, now.live or BASE)
            if now.canary is not None and not self._is_usable(now.canary):
                self._note("rolled_back", now.canary, "recovery", "it cannot be used any more", now)
                self._write(CANARY_FILE, "")

    def pointer(self, name: str) -> str:
        """Text of a pointer file; empty if there is none.

        Raises:
            AdapterError: it cannot be read.
        """
        try:
            return (self._root / name).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterError(f"cannot read {self._root / name}: {error}") from error

    def _is_usable(self, name: str) -> bool:
        try:
            self._check(name)
        except AdapterError:
            return False
        return True

    def _note(
        self, event: Event, version: str | None, by: Actor, reason: str, before: Serving, *, pinned: bool = False
    ) -> None:
        previous = before.live or BASE
        self.log.append(
            Activation(
                time=self._clock(),
                event=event,
                version=version or BASE,
                previous=previous,
                by=by,
                reason=reason,
                pinned=pinned,
            )
        )

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
    """Among all threads and processes that use this directory; the kernel releases it if the holder dies.

    Raises:
        OSError: the lock file cannot be made.
    """
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
    """What keeps a version that passed the gate, compared with `over`, from the traffic."""
    if serving.pinned is not None:
        return f"{serving.pinned} is pinned"
    live = serving.live or BASE
    return None if over in (None, live) else f"it was compared with {over}, and {live} is live now"
