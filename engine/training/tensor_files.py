"""Tensor files that are either whole or not there: atomic replacement, and checks of what was read."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from core.errors import DamagedAdapterError

_PARTIAL = ".partial"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A sibling path to write to; flushed and renamed onto `path` at the end, removed on failure.

    Whoever reads `path` sees the old file or the new one, also after a power cut. One writer at a time.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(directory: Path) -> None:
    """Delete what a killed process left half-written; only while nobody writes there."""
    for path in directory.glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def check_tensors(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Size], source: str) -> None:
    """Raise DamagedAdapterError unless names and shapes are exactly the wanted ones, and all values finite."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != dict(wanted):
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise DamagedAdapterError(f"{source}: {len(odd)} tensors are missing, extra or misshapen, first {odd[0]}")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DamagedAdapterError(f"{source}: {name} holds values that are not finite")


def _flush(path: Path) -> None:
    """Fsync a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
