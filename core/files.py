"""Files and directories that are either whole or not there, also after a crash or a power cut.

What is new is written beside its target, flushed, and renamed onto it: a reader sees the old content or the new one,
never a part. Several writers of one target do not disturb each other; the last one wins.
"""

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a sibling path to write to. It replaces `path` at the end, or is removed after an error."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file (UTF-8); it is on disk on return. After an OSError the old file is intact."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Give a sibling directory to fill. It becomes `target` at the end, or is removed after an error."""
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)
        sync_tree(staging)
        staging.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def make_directory(path: Path) -> None:
    """Create a directory and its parents, if need be; on disk on return, so that what is flushed in it can be found."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync(one.parent)


def remove_partial_directories(target: Path) -> None:
    """Delete what a killed process left of a half-filled `target`; only while nobody fills it."""
    for staging in target.parent.glob(f".{target.name}.*/"):
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel drops it if the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_partial_files(path: Path) -> None:
    """Delete what a killed process left of a half-written `path`; only while nobody writes it."""
    for partial in path.parent.glob(f".{path.name}*{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or a directory: a rename in it is durable only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush every file below, and the directories themselves."""
    for parent, _, names in os.walk(directory):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))
