"""Process hygiene of `mace serve`: whatever it started ends with it, grandchildren too."""

import contextlib
import ctypes
import os
from collections.abc import Collection

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Orphans among our descendants become our children (Linux), so that `end_descendants` finds them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def own_children(names: Collection[str]) -> list[psutil.Process]:
    """Our direct children of those process names."""
    children = []
    for child in psutil.Process(os.getpid()).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() in names:
                children.append(child)
    return children


def end_descendants(grace_s: float) -> None:
    """Wait for descendants to end by themselves, then SIGTERM, then SIGKILL; only our own are touched."""
    me = psutil.Process(os.getpid())
    _, alive = psutil.wait_procs(me.children(recursive=True), timeout=grace_s / 2)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(alive, timeout=grace_s / 2)
    for process in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(me.children(recursive=True), timeout=grace_s / 2)
