"""Adapter versions on disk.

::

    adapters/
      v0001/  adapter_config.json  adapter_model.safetensors  manifest.json
      v0002/  ...                        rejected candidates are kept too, with the gate's reason
      live, pin, canary, retired, activations.jsonl     what is served: see `alignment.versions.serving_state`
      last                               highest number ever given: none is used twice, even after a deletion,
                                         because vLLM's prefix cache is keyed by adapter name
      .lock                              held while a version is committed or the pointer moves
      .tmp-xxxx/  .tmp-xxxx.lock         a version in the making; the lock is held by the process that makes it

Versions are immutable. A version exists from the moment of one rename until the moment of another: what a crash leaves
behind is a temporary directory, whose lock died with its process, and the next `open` removes it.

Deletion has two steps, because other executors, and requests between the look-up of a name and the engine, may still
need the files: a version is *retired* first (its name disappears everywhere), and deleted once nobody has used it
for `REST_S`.
"""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from alignment.versions.adapter_files import (
    MANIFEST_FILE,
    AdapterManifest,
    check_files,
    read_manifest,
    version_name,
    version_number,
)
from alignment.versions.serving_state import (
    CANARY_FILE,
    LIVE_FILE,
    PIN_FILE,
    RETIRED_FILE,
    ServingState,
    one_writer,
)
from core.errors import AdapterError, DamagedAdapterError, UnfitAdapterError, UnknownVersionError
from core.files import make_directory, remove_partial_files, sync, sync_tree, write_atomically

REST_S = 30.0
"""Far above the time that executors need to see a retirement, and a request from its arrival to the engine."""
_TEMPORARY = ".tmp-"
_LAST_FILE = "last"
_UNFIT = "; nothing else fits it"


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One usable version."""

    name: str
    path: Path
    manifest: AdapterManifest


Names = list[str]  # inside the class, `list` is a method


class AdapterRegistry:
    """The versions under one directory; `base_model` and `fingerprint`, if given, are what they must be trained for.

    Disk errors (full, read-only) are `AdapterError`. Where a version is asked for, one that is not there is an
    `UnknownVersionError`, and one that cannot be used a `DamagedAdapterError` (`UnfitAdapterError`: by this model).
    """

    def __init__(self, root: Path, base_model: str | None = None, fingerprint: str = "") -> None:
        self.root = root
        self.damaged: dict[str, DamagedAdapterError] = {}
        """Versions that the last `list` had to skip, with the reason, by name."""
        self.serving = ServingState(root, self._check_servable)
        """The pointers: the live version, a pin, a canary."""
        self.fingerprint = fingerprint
        """Of the model that is served; empty if nobody said."""
        self._base_model = base_model
        self._locks_held: dict[Path, int] = {}

    @classmethod
    def open(cls, root: Path, base_model: str | None = None, fingerprint: str = "") -> "AdapterRegistry":
        """Create the directory if needed and remove what crashed processes left behind."""
        registry = cls(root, base_model, fingerprint)
        try:
            make_directory(root)
            registry._remove_leftovers()
            if any((root / name).exists() for name in (LIVE_FILE, _LAST_FILE)):  # else there is nothing to look at
                with one_writer(root):
                    for name in (LIVE_FILE, PIN_FILE, CANARY_FILE, RETIRED_FILE, _LAST_FILE):
                        remove_partial_files(root / name)
                registry.serving.reconcile()
        except OSError as error:
            raise AdapterError(f"cannot open the adapter directory {root}: {error}") from error
        return registry

    def begin(self) -> Path:
        """A new empty directory to write the adapter's files into; end with `commit` or `abandon`."""
        path = self.root / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            descriptor = os.open(_lock_path(path), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.mkdir()
        except OSError as error:
            raise AdapterError(f"cannot write to the adapter directory {self.root}: {error}") from error
        self._locks_held[path] = descriptor  # closed, and so released, by commit, abandon or the process's end
        return path

    def commit(self, temporary: Path, manifest: AdapterManifest) -> AdapterVersion:
        """Turn the directory from `begin` into the next version: all of it, or nothing.

        Raises:
            DamagedAdapterError: the files are not a readable PEFT adapter; the directory is left for `abandon`.
        """
        check_files(temporary)
        try:
            with one_writer(self.root):
                last = version_number(self.serving.pointer(_LAST_FILE)) or 0
                name = version_name(1 + max([last, *self._numbers()]))
                complete = manifest.model_copy(update={"version": name})
                write_atomically(temporary / MANIFEST_FILE, complete.model_dump_json(indent=2) + "\n")
                sync_tree(temporary)
                write_atomically(self.root / _LAST_FILE, f"{name}\n")
                temporary.rename(self.root / name)
                sync(self.root)
        except OSError as error:
            raise AdapterError(f"cannot commit an adapter version to {self.root}: {error}") from error
        self._release(temporary)
        return AdapterVersion(name, self.root / name, complete)

    def abandon(self, temporary: Path) -> None:
        """Remove the directory from `begin`; harmless if it is gone."""
        shutil.rmtree(temporary, ignore_errors=True)
        self._release(temporary)

    def get(self, name: str) -> AdapterVersion:
        """One version, published or rejected."""
        path = self.root / name
        if version_number(name) is None or not path.is_dir():
            raise UnknownVersionError(f"no adapter version {name[:50]!r}")
        manifest = read_manifest(path, self._base_model, self.fingerprint)
        check_files(path)
        return AdapterVersion(name, path, manifest)

    def names(self) -> set[str]:
        """Every version that has a directory, usable or not."""
        return {version_name(number) for number in self._numbers()}

    def list(self) -> tuple[AdapterVersion, ...]:
        """All usable versions, oldest first; `damaged` then tells which were skipped."""
        usable = []
        damaged: dict[str, DamagedAdapterError] = {}
        for number in sorted(self._numbers()):
            name = version_name(number)
            try:
                usable.append(self.get(name))
            except DamagedAdapterError as error:
                damaged[name] = error
            except UnknownVersionError:  # removed since the directory was read
                continue
        self.damaged = damaged
        return tuple(usable)

    def delete(self, name: str) -> bool:
        """Remove a retired version; its number is never used again. False if it serves or is not retired (any more).

        After an error it is whole, or gone.
        """
        try:
            with one_writer(self.root):
                now = self.serving.read()
                if name not in now.retired or name in (now.live, now.pinned, now.canary):
                    return False
                doomed = self.root / f"{_TEMPORARY}{uuid.uuid4().hex}"
                if (self.root / name).is_dir():
                    # The highest number outlives its directory, also one that was copied here by hand.
                    if (version_number(name) or 0) > (version_number(self.serving.pointer(_LAST_FILE)) or 0):
                        write_atomically(self.root / _LAST_FILE, f"{name}\n")
                    (self.root / name).rename(doomed)
                    sync(self.root)
                self.serving.forget_retired(name)
        except OSError as error:
            raise AdapterError(f"cannot delete {name} from {self.root}: {error}") from error
        shutil.rmtree(doomed, ignore_errors=True)  # what is left of it, the next `open` removes
        return True

    def live(self) -> AdapterVersion | None:
        """The live version; None is the bare base model."""
        name = self.serving.pointer(LIVE_FILE)
        return self.get(name) if name else None

    def recover_live(self) -> AdapterVersion | None:
        """The live version, or if that cannot be used another one, which is made live.

        That is the newest usable published one before it. If it is of another base model, it is what was live last
        with this one, and a pin is released: it was for what cannot be kept.
        """
        try:
            live = self.live()
            return live if live else self._back_from_another_model()
        except UnfitAdapterError as error:
            return self._follow_model(str(error))
        except AdapterError:
            limit = version_number(self.serving.pointer(LIVE_FILE))
        failed = self.serving.rolled_back()
        usable = [one for one in self.list() if one.manifest.status == "published" and one.name not in failed]
        older = [one for one in usable if limit is None or (version_number(one.name) or 0) < limit]
        fallback = older[-1] if older else None
        pinned = self.serving.read().pinned is not None
        reason = f"{self.serving.pointer(LIVE_FILE)[:50]!r} cannot be used"
        self.serving.activate(fallback.name if fallback else None, by="recovery", reason=reason, pin=pinned)
        return fallback

    def _back_from_another_model(self) -> AdapterVersion | None:
        """The base is live: only because another model was served, for which nothing fitted, or for itself?"""
        moves = [entry for entry in self.serving.activations() if entry.event == "activated"]
        is_makeshift = bool(moves) and moves[-1].by == "recovery" and moves[-1].reason.endswith(_UNFIT)
        return self._follow_model("it was served before another base model") if is_makeshift else None

    def _follow_model(self, reason: str) -> AdapterVersion | None:
        """Make live what was live last of all that fits the model; the base if nothing does."""
        moves = [entry.version for entry in self.serving.activations() if entry.event == "activated"]
        usable = {one.name: one for one in self.list() if one.manifest.status == "published"}
        found = next((usable[name] for name in reversed(moves) if name in usable), None)
        if found is not None or self.serving.pointer(LIVE_FILE):
            why = reason if found else f"{reason}{_UNFIT}"
            self.serving.activate(found.name if found else None, by="recovery", reason=why)
        return found

    def retire_old(self, keep: int, in_use: set[str]) -> tuple[Names, Names]:
        """Retire what is beyond `keep`, and delete what has rested; returns what is retired now, and what was deleted.

        Every executor calls this again and again with the versions that it needs, which keeps them from being deleted
        by others. Damaged versions are left alone and not counted: they may belong to another base model.
        """
        serving, failed, versions = self.serving.read(), self.serving.rolled_back(), self.list()
        for version in versions:
            if version.name == serving.live and version.manifest.parent:
                in_use = in_use | {version.manifest.parent}
        surplus = versions_to_retire(
            {one.name: one.manifest.status == "rejected" or one.name in failed for one in versions},
            keep,
            retired=serving.retired,
            protected={serving.live, serving.pinned, serving.canary, *in_use},
        )
        if surplus or in_use & serving.retired.keys():
            serving = self.serving.retire(surplus, in_use)
        due = rested(serving.retired, time.time())
        return sorted(serving.retired), [name for name in due if self.delete(name)]

    def _check_servable(self, name: str) -> None:
        if self.get(name).manifest.status != "published":
            raise AdapterError(f"{name} was rejected by the gate and cannot go live")

    def _numbers(self) -> set[int]:
        """Every number that a directory has, damaged ones too."""
        if not self.root.is_dir():
            return set()
        numbers = [version_number(path.name) for path in self.root.iterdir()]
        return {number for number in numbers if number is not None}

    def _release(self, temporary: Path) -> None:
        descriptor = self._locks_held.pop(temporary, None)
        if descriptor is not None:
            _lock_path(temporary).unlink(missing_ok=True)
            os.close(descriptor)

    def _remove_leftovers(self) -> None:
        for lock in self.root.glob(f"{_TEMPORARY}*.lock"):
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # its process lives
                continue
            else:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
        for path in self.root.glob(f"{_TEMPORARY}*"):
            if path.is_dir() and not _lock_path(path).exists():
                shutil.rmtree(path, ignore_errors=True)


def _lock_path(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.lock")


def versions_to_retire(
    versions: Mapping[str, bool],
    keep: int,
    *,
    retired: Collection[str] = (),
    protected: Collection[str | None] = (),
) -> list[str]:
    """Names beyond `keep`: failed ones first, then the others, oldest first.

    Never a protected one, nor the newest of all, whose verdict has just been made; so more than `keep` may stay.

    Args:
        versions: all usable versions, oldest first, and whether each failed: rejected by the gate, or rolled back.
        keep: how many may stay.
        retired: what is on its way out already.
        protected: live and its parent, pinned, canary, in use, what training started from.
    """
    staying = [name for name in versions if name not in retired]
    excess = len(staying) - keep
    if excess <= 0:
        return []
    may_go = [name for name in staying[:-1] if name not in protected]
    return sorted(may_go, key=lambda name: not versions[name])[:excess]


def rested(retired: Mapping[str, float], now_s: float) -> list[str]:
    """Retired versions that nobody has used for `REST_S`; times are Unix seconds."""
    return [name for name, at in sorted(retired.items()) if now_s - at >= REST_S]
