"""What `mace doctor` and `mace serve` ask of a GPU: has torch code for it; and of a Jetson board, beside that.

A board's GPU and CPU share one memory, so swap and page cache count; its clocks depend on a power mode; and code for
other GPUs of the same generation does not run on it.
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil

from core.checks import Outcome
from core.config import AppArgs

TEGRA_RELEASE = Path("/etc/nv_tegra_release")
SWAPS = Path("/proc/swaps")
_GIB = 1 << 30
_MIN_RELEASE = 39
"""Of Jetson Linux (L4T): JetPack 7.2, the first whose CUDA 13 an Orin has."""
_SETUP = "scripts/setup jetson --torch WHEEL (docs/edge.md)"


def is_jetson() -> bool:
    """Is this machine a Jetson board?"""
    return TEGRA_RELEASE.exists() or "nvgpu" in _output("nvidia-smi", "-L")


def gpu_code_problem() -> str:
    """Why no kernel of torch runs on the GPU, and what to do; empty if they do, or there is no GPU."""
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return ""
    capability, built_for = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if any(_runs_on(code, capability) for code in built_for):
        return ""
    name = "sm_{}{}".format(*capability)
    fix = _SETUP if is_jetson() else "scripts/setup gpu, with a torch that has it"
    return f"torch {torch.__version__} has no code for this GPU ({name}), only {' '.join(built_for)}; {fix}"


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Whether code such as `sm_80`, `sm_90a` (for that alone) or `compute_80` (PTX) runs on a GPU.

    Machine code runs on later GPUs of its generation, but not on the boards' sm_72, sm_87 and sm_101, nor theirs on
    others.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", code)
    if found is None:
        return False
    built = int(found[2]), int(found[3])
    if found[4] or (found[1] == "sm" and {built, capability} & {(7, 2), (8, 7), (10, 1)}):
        return built == capability
    return built <= capability and (found[1] == "compute" or built[0] == capability[0])


def jetson_checks(args: AppArgs | None) -> dict[str, Callable[[], Outcome]]:
    """Checks of a board by name; none elsewhere. `args` are the settings that would be served."""
    if not is_jetson():
        return {}
    return {
        "jetpack": _jetpack,
        "power mode": _power_mode,
        "unified memory": lambda: _unified_memory(args),
        "swap": _swap,
    }


def _jetpack() -> Outcome:
    fix = "flash JetPack 7.2 or newer: vLLM's wheel is built for CUDA 13, which JetPack 6 (CUDA 12) cannot run"
    try:
        found = re.match(r"# R(\d+).*?REVISION: ([\d.]+)", TEGRA_RELEASE.read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found is None:
        return "warning", f"{TEGRA_RELEASE} does not say which; in a container mount it", fix
    return "ok" if int(found[1]) >= _MIN_RELEASE else "error", f"Jetson Linux {found[1]}.{found[2]}", fix


def _power_mode() -> Outcome:
    fix = "sudo nvpmodel -m 0, and a fan that holds it: below that clocks, and so the targets, are lower"
    found = re.search(r"Power Mode: *(\S+)", _output("nvpmodel", "-q"))
    if found is None:
        return "warning", "nvpmodel -q does not say", "run mace doctor outside of a container, or as root"
    return "ok" if found[1].startswith("MAXN") else "warning", found[1], fix


def _unified_memory(args: AppArgs | None) -> Outcome:
    """What vLLM asks for at its start has to be free, and the page cache counts as taken there."""
    memory = psutil.virtual_memory()
    kwargs = {} if args is None else args.engine.engine_kwargs
    share = kwargs.get("gpu_memory_utilization", 0.8 if args is None else args.engine.gpu_memory_utilization)
    found = f"{memory.free / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free, {memory.cached / _GIB:.1f} of files"
    if memory.free >= share * memory.total:
        return "ok", f"{found}; vLLM asks for {share * memory.total / _GIB:.1f}", ""
    if memory.available >= share * memory.total:
        return "warning", found, "sync; echo 3 | sudo tee /proc/sys/vm/drop_caches"
    fix = "sudo systemctl isolate multi-user (no desktop), or lower engine.gpu_memory_utilization"
    return "warning", f"{found}; vLLM asks for {share * memory.total / _GIB:.1f}", fix


def _swap() -> Outcome:
    """Memory of the GPU is never swapped; what zram holds is taken from it, and swapped weights stall every token."""
    lines = SWAPS.read_text(encoding="utf-8").splitlines()[1:]
    used = sum(int(line.split()[3]) for line in lines) << 10
    names = ", ".join(line.split()[0] for line in lines)
    if any("zram" in line for line in lines):
        return (
            "warning",
            names,
            "sudo systemctl disable --now nvzramconfig; swap on NVMe, if any: zram costs the GPU memory",
        )
    if used > _GIB // 2:
        return "warning", f"{names}, {used / _GIB:.1f} GiB in use", "stop what else runs: a swapped engine stalls"
    return "ok", names or "none", ""


def _output(*command: str) -> str:
    """What a command prints; empty without the command."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
