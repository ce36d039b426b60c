"""Process hygiene of `mace serve`: whatever it started ends with it, grandchildren too."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection

import psutil

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LOOK_S = 0.5


def run_apart(limit_s: float) -> None:
    """Go on in a child with a session of its own, while this process waits for its end.

    A terminal, `timeout` and supervisors signal the whole process group. Ray's processes must not get that: the head
    would end before what needs it to stop. So the group is this process alone, which passes the first signal on as
    SIGTERM. It ends with the child's exit code, or with 1 when it had to end the child `limit_s` seconds after the
    signal. If this process is killed, the child gets SIGTERM from the kernel.
    """
    numbers = {number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    numbers |= {signal.SIGINT, signal.SIGTERM}  # a shell starts background jobs with SIGINT ignored
    old = signal.pthread_sigmask(signal.SIG_BLOCK, numbers | {signal.SIGCHLD})
    become_subreaper()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        if os.getppid() != parent:
            os._exit(1)
        return
    give_up_s = float("inf")
    while True:
        got = signal.sigtimedwait(numbers | {signal.SIGCHLD}, _LOOK_S)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if got is not None and got.si_signo != signal.SIGCHLD and give_up_s == float("inf"):
            give_up_s = time.monotonic() + limit_s
            os.kill(child, signal.SIGTERM)
        if time.monotonic() > give_up_s:
            os.kill(child, signal.SIGKILL)
    end_descendants(0.0)
    code = os.waitstatus_to_exitcode(status)
    was_stopped = give_up_s < float("inf") and code == -signal.SIGTERM  # before it listened to signals
    os._exit(0 if was_stopped else max(code, 0) or int(code < 0))


def become_subreaper() -> None:
    """Orphans among our descendants become our children (Linux), so that `end_descendants` finds them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def own_children(names: Collection[str]) -> list[psutil.Process]:
    """Our direct children of those process names."""
    children = []
    for child in psutil.Process(os.getpid()).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() in names:
                children.append(child)
    return children


def is_alive(process: psutil.Process) -> bool:
    """True while a process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_descendants(grace_s: float) -> None:
    """Wait for descendants to end by themselves, then SIGTERM, then SIGKILL; only our own are touched."""
    me = psutil.Process(os.getpid())
    _, alive = psutil.wait_procs(me.children(recursive=True), timeout=grace_s / 2)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(alive, timeout=grace_s / 2)
    while left := [process for process in me.children(recursive=True) if is_alive(process)]:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)
