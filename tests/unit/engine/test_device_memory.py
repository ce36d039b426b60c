"""Free memory of a CUDA device by what torch and the driver say of it; these are made up, for there is no device."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from engine.training.device_memory import (
    begin_peak,
    free_memory_bytes,
    graph_pool_bytes,
    is_out_of_memory,
    peak_above_now,
)

CUDA = torch.device("cuda", 0)


@pytest.fixture
def device(monkeypatch):
    """24 units: 15 in tensors, 6 cached by torch, 1 of another process, 2 free."""
    state = SimpleNamespace(total=24, free=2, reserved=21, allocated=15, peak=99, is_integrated=False, segments=[])
    fakes = {
        "mem_get_info": lambda _: (state.free, state.total),
        "memory_reserved": lambda _: state.reserved,
        "memory_allocated": lambda _: state.allocated,
        "max_memory_allocated": lambda _: state.peak,
        "reset_peak_memory_stats": lambda _: setattr(state, "peak", state.allocated),
        "memory_snapshot": lambda: state.segments,
        "get_device_properties": lambda _: SimpleNamespace(is_integrated=state.is_integrated),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return state


def test_what_torch_keeps_unused_is_free(device):
    assert free_memory_bytes(CUDA) == 2 + 6


def test_where_cpu_and_gpu_share_a_memory_what_the_system_would_drop_is_free_too(device, monkeypatch):
    device.is_integrated = True
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40))
    assert free_memory_bytes(CUDA) == 40 + 6


def test_a_cpu_has_what_the_system_can_give(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40))
    assert free_memory_bytes(torch.device("cpu")) == 40
    assert graph_pool_bytes(torch.device("cpu")) == peak_above_now(torch.device("cpu")) == 0


def test_the_unused_part_of_a_graphs_pool_is_for_that_graph(device):
    def segment(pool, total, allocated, index=0):
        return {"device": index, "segment_pool_id": pool, "total_size": total, "allocated_size": allocated}

    device.segments = [
        segment((0, 0), 9, 2),
        segment((0, 3), 8, 3),
        segment((0, 4), 2, 2),
        segment((0, 3), 7, 0, 1),
    ]
    assert graph_pool_bytes(CUDA) == 5


def test_a_peak_is_what_was_taken_for_a_while(device):
    begin_peak(CUDA)
    assert peak_above_now(CUDA) == 0
    device.peak, device.allocated = 20, 16
    assert peak_above_now(CUDA) == 4


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_a_lack_of_memory_is_known_by_its_class_or_its_words(error, is_it):
    assert is_out_of_memory(error) is is_it
