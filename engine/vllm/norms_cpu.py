"""vLLM's own kernels for RMS norms on the CPU, which it ships but does not choose: its registry has them for GPUs only,
so that each norm is eight small operations of torch.

Here they are registered as one more implementation, and preferred for the arguments that they take. All functions have
the signature of the operation, which the registry checks.
"""

# ruff: noqa: ARG001

import torch
from torch import Tensor
from vllm import ir

_PROVIDER = "mace_cpu"
_KERNELS = torch.ops._C  # noqa: SLF001 - vLLM's


def use_cpu_norms() -> None:
    """Prefer the kernels for as long as this process lives. May be called again."""
    priority = [_PROVIDER, "native"]
    if not all(hasattr(_KERNELS, name) for name in ("rms_norm", "fused_add_rms_norm")):
        return
    if _PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(_PROVIDER, supports_args=_takes)(_rms_norm)
        ir.ops.fused_add_rms_norm.register_impl(_PROVIDER, supports_args=_takes_sum, inplace=True)(_add_rms_norm)
    ir.ops.rms_norm.set_default(priority)
    ir.ops.fused_add_rms_norm.set_default(priority)


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    output = torch.empty_like(x)
    _KERNELS.rms_norm(output, x, weight, epsilon)
    return output


def _add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    _KERNELS.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype
        and x.ndim == 2
        and x.is_contiguous()
    )


def _takes_sum(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _takes(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype and x_residual.is_contiguous()
