"""vLLM's configuration as it is on a machine with a CUDA device, made in processes of their own without one.

Only the device's driver is made up: vLLM's platform for CUDA, its defaults and its checks are the real ones, and so is
what we tell it.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def cuda_process(capability: tuple[int, int] = (8, 0)) -> Iterator[ProcessPoolExecutor]:
    """A process in which vLLM has not been imported yet and sees one CUDA device of this compute capability."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _become_cuda, (capability,)) as process:
        yield process


def _become_cuda(capability: tuple[int, int]) -> None:
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    sys.modules["vllm._C_stable_libtorch"] = ModuleType(
        "vllm._C_stable_libtorch"
    )  # kernels, which nothing here runs
    from vllm import platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Device(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id=0):
            return "a CUDA device"

        @classmethod
        def get_device_total_memory(cls, device_id=0):
            return 24 << 30

        @classmethod
        def device_count(cls):
            return 1

        @classmethod
        def log_warnings(cls):
            pass

    platforms._current_platform = Device()  # noqa: SLF001 - what vLLM would find out from the driver
    from vllm.config import vllm as config

    config.HAS_TRITON = True  # this machine's has no backend, and vLLM's newer runner needs one
