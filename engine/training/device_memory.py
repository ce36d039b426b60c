"""Memory of a device: what is free, what a forward pass takes for its duration, and which errors are a lack of it.

Torch keeps the memory that tensors give back (its cache), so the driver's number says nothing about what can be
allocated; and where GPU and CPU share one memory the driver does not count what the system would drop for it.
"""

import psutil
import torch

_NO_ROOM = ("can't allocate memory", "_ALLOC_FAILED", "CUDA error: out of memory")
"""Words of a lack of memory in errors that have no class for it: torch's CPU allocator, NVIDIA's libraries that want a
workspace (CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED), and the driver."""
_COMMON_POOL = (0, 0)
"""Id of the pool that all allocations share; others are of captured graphs."""


def is_out_of_memory(error: BaseException) -> bool:
    """The device had no room for what was asked of it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_ROOM)


def free_memory_bytes(device: torch.device) -> int:
    """Memory that could still be allocated on the device: what nobody has, and what torch keeps unused."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if torch.cuda.get_device_properties(device).is_integrated:
        return int(psutil.virtual_memory().available) + cached
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def graph_pool_bytes(device: torch.device) -> int:
    """Unused part of the pools of captured graphs: in torch's cache, but for the graphs alone."""
    if device.type != "cuda":
        return 0
    pools = [
        segment
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == device.index and tuple(segment["segment_pool_id"]) != _COMMON_POOL
    ]
    return sum(int(segment["total_size"] - segment["allocated_size"]) for segment in pools)


def begin_peak(device: torch.device) -> None:
    """From here on `peak_above_now` looks for the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_above_now(device: torch.device) -> int:
    """Most that was allocated since `begin_peak` beyond what still is; 0 on CPU, where torch does not count."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)


def release_cached_memory(device: torch.device) -> None:
    """Give torch's unused memory back to the driver, so that it can be cut anew. What is still referred to stays."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
