"""What `mace serve` needs of the machine beside Python: temporary and home folders, file handles, shared memory.

`prepare_host` mends what it can for this process and its children, says so, and raises for the rest. `mace doctor`
shows the same findings before.
"""

import contextlib
import getpass
import os
import resource
import shutil
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from core.errors import ConfigError

_MAX_SOCKET_BYTES = 107
"""Of the path of a Unix socket on Linux."""
LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MAX_FOLDER_BYTES = _MAX_SOCKET_BYTES - len(LONGEST_SOCKET)
_SHORT_FOLDERS = ("/tmp", "/var/tmp")
MIN_FILES = 4096
"""Handles; each connection takes two in Serve's proxy."""
MIN_SHARED_BYTES = 32 << 20
"""For the queues between the engine's processes; Docker's default is 64 MiB."""
SHARED_MEMORY = Path("/dev/shm")


def prepare_host(environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Make this process fit to start the server; returns a sentence for each thing that was changed or is scarce.

    Raises:
        ConfigError: something is missing that cannot be replaced.
    """
    notices = [*choose_folders(environ), *replace_home(environ)]
    if problem := shared_memory_problem():
        raise ConfigError(problem)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return notices + ([problem] if (problem := files_problem(hard)) else [])


def choose_folders(environ: MutableMapping[str, str]) -> list[str]:
    """Replace a temporary folder that sockets cannot be in: RAY_TMPDIR and TMPDIR, whose default is /tmp.

    Raises:
        ConfigError: there is no other.
    """
    notices = []
    for name in ("RAY_TMPDIR", "TMPDIR"):
        folder = environ.get(name) or ("" if name == "RAY_TMPDIR" else _SHORT_FOLDERS[0])
        if not folder or not (problem := _folder_problem(folder)):
            continue
        short = next((short for short in _SHORT_FOLDERS if not _folder_problem(short)), None)
        if short is None:
            raise ConfigError(f"{name}: {problem}; set {name} to a short path to a folder that can be written")
        environ[name] = short
        tempfile.tempdir = None  # looked up again
        notices.append(f"{name}: {problem}; {short} is used instead")
    return notices


def replace_home(environ: MutableMapping[str, str]) -> list[str]:
    """Give libraries a folder for their caches where the home directory cannot be written, and a user name."""
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        if not environ.get(name, "?"):
            del environ[name]  # libraries take the empty text for a path
    try:
        getpass.getuser()
    except (KeyError, OSError):  # torch names a folder after the user
        environ["USER"] = f"uid-{os.getuid()}"
    if not (problem := home_problem(environ)):
        return []
    folder = Path(tempfile.gettempdir(), f"mace-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{problem}, and {folder} is somebody else's; set HOME to a folder that can be written")
    environ["HOME"] = str(folder)
    return [f"{problem}; caches go to {folder}"]


def home_problem(environ: MutableMapping[str, str]) -> str:
    """Why caches cannot be written below the home directory; empty if they can."""
    home = Path(environ.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111 - leaves what it cannot resolve
    needed = [name for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME") if not environ.get(name)]
    if not needed:
        return ""
    if not home.is_absolute():
        return "there is no home directory"
    for folder in (home / ".cache", home / ".config"):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not _is_writable(existing) or (not home.exists() and existing != home):
            return f"the home directory {home} cannot be written"
    return ""


def files_problem(hard: int) -> str:
    """What a hard limit of open files means, if it is low; else empty."""
    if hard == resource.RLIM_INFINITY or hard >= MIN_FILES:
        return ""
    return f"{hard} open files are enough for about {hard // 3} connections; raise the limit (ulimit -Hn 65536)"


def shared_memory_problem(path: Path = SHARED_MEMORY) -> str:
    """Why the engine's processes cannot talk through shared memory; empty if they can."""
    advice = f"mount a tmpfs of {MIN_SHARED_BYTES >> 20} MiB or more there (docker run --shm-size 1g)"
    if not path.is_dir() or not _is_writable(path):
        return f"{path} cannot be written; {advice}"
    free = shutil.disk_usage(path).free
    return f"{path} has {free / (1 << 20):.1f} MiB free; {advice}" if free < MIN_SHARED_BYTES else ""


def _folder_problem(folder: str) -> str:
    path = os.path.abspath(folder)  # noqa: PTH100 - of a text that may be no path
    if (size := len(os.fsencode(path))) > MAX_FOLDER_BYTES:
        return f"{path} is too long for Ray's sockets ({size} bytes, at most {MAX_FOLDER_BYTES})"
    with contextlib.suppress(OSError):
        Path(path).mkdir(parents=True, exist_ok=True)
        if _is_writable(Path(path)):
            return ""
    return f"{path} cannot be written"


def _is_writable(folder: Path) -> bool:
    """A test by doing: root may write by its rights where a mount or a kernel file system refuses."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
