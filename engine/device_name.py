"""What this device is called in profiles: two engines with one name are expected to run at one speed."""

import os
import re
from pathlib import Path

import torch

_THREADS_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"


def device_name() -> str:
    """`NVIDIA H100 80GB HBM3`, or the CPU's model and the worker's threads, `AMD EPYC 9B14, 2 threads`.

    Call after `vllm_compat.configure_environment`, which decides the threads.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    num_threads = len(os.environ.get(_THREADS_VARIABLE, "").split(",")) or len(os.sched_getaffinity(0))
    return f"{_cpu_model()}, {num_threads} thread{'s' if num_threads > 1 else ''}"


def _cpu_model() -> str:
    """From the kernel; Arm boards such as the Orin name the board instead of the processor."""
    for path, pattern in (("/proc/cpuinfo", r"^model name\s*:\s*(.+)$"), ("/proc/device-tree/model", r"^([^\0]+)")):
        source = Path(path)
        if source.exists():
            found = re.search(pattern, source.read_text(errors="replace"), re.MULTILINE)
            if found:
                return found.group(1).strip()
    return os.uname().machine
