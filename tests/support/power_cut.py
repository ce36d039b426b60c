"""A disk whose power may fail at any moment: what would be found after a cut at each step of what is done on it.

Python tells before each opening for writing, renaming, removal and new directory (audit hooks), each write by a
descriptor and each flush; what a library writes in between shows at the next of them. Of every moment there are four
disks. A flush makes durable what it flushes, a file's bytes or a directory's names, and nothing else.
"""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

_EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"})
_WRITING = os.O_WRONLY | os.O_RDWR
_active: "Disk | None" = None
_Tree = dict[str, bytes | None]
"""Contents by relative path; None: a directory."""


@dataclass(frozen=True)
class Found:
    """A disk after a cut: what it holds, how it came to be, and which promises had been made by then."""

    tree: _Tree
    kind: str
    """`killed`: all that was written is there, as when the process alone dies. `dropped`: only what was flushed.
    `empty`, `half`: names are as they were, and of bytes that were not flushed none or half are there."""
    promises: frozenset[str]

    def write(self, directory: Path) -> Path:
        """Lay it out in a directory."""
        directory.mkdir()
        for name, content in sorted(self.tree.items()):
            if content is None:
                (directory / name).mkdir()
            else:
                (directory / name).write_bytes(content)
        return directory


@dataclass
class Disk:
    """Everything below `root`, which is durable as it is when `watched` begins."""

    root: Path
    found: list[Found] = field(default_factory=list)
    promises: set[str] = field(default_factory=set)
    _bytes: dict[int, bytes] = field(default_factory=dict)
    """Durable contents of files by inode."""
    _names: dict[int, dict[str, int]] = field(default_factory=dict)
    """Durable names of directories by inode."""
    _held: dict[int, int] = field(default_factory=dict)
    """Descriptors that keep inodes from being used again."""
    is_busy: bool = False

    @contextmanager
    def watched(self) -> Iterator["Disk"]:
        """Collect what is found after a cut at each step of the block, and after it."""
        global _active  # noqa: PLW0603 - audit hooks cannot be removed
        fsync, write = os.fsync, os.write

        def flush(descriptor: int) -> None:
            self.look()
            fsync(descriptor)
            self._flushed(Path(f"/proc/self/fd/{descriptor}").resolve())

        def write_some(descriptor: int, data: bytes) -> int:
            self.look()
            return write(descriptor, data)

        for path in (self.root, *self.root.rglob("*")):
            self._flushed(path)
        _active = self
        try:
            with mock.patch("os.fsync", flush), mock.patch("os.write", write_some):
                yield self
            self.look()
        finally:
            _active = None
            for descriptor in self._held.values():
                os.close(descriptor)

    def promise(self, name: str) -> None:
        """From here on a cut must not undo something that was acknowledged."""
        self.look()
        self.promises.add(name)

    def look(self) -> None:
        """Note what a cut at this moment would leave."""
        if self.is_busy:
            return
        self.is_busy = True
        try:
            now = {path.relative_to(self.root).as_posix(): path for path in self.root.rglob("*")}
            for path in now.values():
                self._hold(path)
            self._note("killed", {name: self._read(path) for name, path in now.items()})
            self._note("dropped", self._durable(self.root.stat().st_ino, ""))
            for kind, share in (("empty", 0.0), ("half", 0.5)):
                self._note(kind, {name: self._part(path, share) for name, path in now.items()})
        finally:
            self.is_busy = False

    def _note(self, kind: str, tree: _Tree) -> None:
        one = Found(tree, kind, frozenset(self.promises))
        if not any(one.tree == other.tree and one.promises == other.promises for other in self.found):
            self.found.append(one)

    def _part(self, path: Path, share: float) -> bytes | None:
        content = self._read(path)
        if content is None:
            return None
        durable = self._bytes.get(path.stat().st_ino, b"")
        kept = durable if content.startswith(durable) else b""  # what was appended to keeps what it had
        return kept + content[len(kept) :][: int(share * (len(content) - len(kept)))]

    def _durable(self, inode: int, prefix: str) -> _Tree:
        tree: _Tree = {}
        for name, one in self._names.get(inode, {}).items():
            is_directory = stat.S_ISDIR(os.fstat(self._held[one]).st_mode)
            tree[prefix + name] = None if is_directory else self._bytes.get(one, b"")
            tree |= self._durable(one, f"{prefix}{name}/") if is_directory else {}
        return tree

    def _flushed(self, path: Path) -> None:
        if path != self.root and self.root not in path.parents:
            return
        self.is_busy = True
        inode = self._hold(path)
        if path.is_dir():
            self._names[inode] = {one.name: self._hold(one) for one in path.iterdir()}
        else:
            self._bytes[inode] = path.read_bytes()
        self.is_busy = False

    def _hold(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)
        return inode

    @staticmethod
    def _read(path: Path) -> bytes | None:
        return None if path.is_dir() else path.read_bytes()


def _hear(event: str, arguments: tuple) -> None:
    if _active is None or _active.is_busy:
        return
    is_writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if is_writing or event in _EVENTS:
        _active.look()


sys.addaudithook(_hear)
