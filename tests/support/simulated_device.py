"""A device of known costs and its profile, and short traces on it."""

from typing import Any

from core.batch import ForwardShape
from core.model_dims import ModelDims
from core.types import SliceKind
from profiler.profile import QUANTILE_LEVELS, FitError, LatencyModel, MemoryModel, Origin, Profile, RawSamples
from scheduler.iteration.planner import EngineLimits
from simulator.hardware import Hardware
from simulator.trace import Trace

_SLICE_COST_S = {
    SliceKind.EMBED: 1e-5,
    SliceKind.REFERENCE_LAYER: 1e-3,
    SliceKind.POLICY_LAYER: 1.2e-3,
    SliceKind.BACKWARD_LAYER: 3e-3,
    SliceKind.REFERENCE_HEAD: 5e-4,
    SliceKind.POLICY_HEAD: 1e-3,
    SliceKind.LOSS: 2e-4,
    SliceKind.OPTIMIZER: 2e-3,
}


class KnownDevice:
    """The perfect predictor of a device with affine costs."""

    overhead_s = 0.001

    def __init__(self):
        self.num_observed = 0

    def forward_s(self, shape: ForwardShape) -> float:
        if not shape.num_tokens:
            return 0.0
        per_token = 1e-4 * shape.num_decode + 1e-6 * shape.decode_context + 5e-5 * shape.num_prefill_tokens
        return 0.008 + per_token + 1e-8 * shape.prefill_attention

    def forward_upper_s(self, shape: ForwardShape) -> float:
        return 1.2 * self.forward_s(shape)

    def slice_s(self, kind: SliceKind, num_tokens: int) -> float:
        return _SLICE_COST_S[kind] * (0.3 + num_tokens / 512)

    def slice_upper_s(self, kind: SliceKind, num_tokens: int) -> float:
        return 1.1 * self.slice_s(kind, num_tokens)

    def observe(self, sample) -> None:
        self.num_observed += 1


DIMS = ModelDims(3, 64, 340, num_heads=4, num_kv_heads=4, head_dim=16, vocab_size=3072, dtype_bytes=2)


def make_hardware(*, profile=None, new_predictor=KnownDevice, kv_tokens=20_000, max_tokens=2048) -> Hardware:
    return Hardware(
        profile=profile or make_profile(spread=0.2),
        new_predictor=new_predictor,
        limits=EngineLimits(
            max_tokens=max_tokens,
            kv_bytes=512 * kv_tokens,
            arena_bytes=1 << 28,
            kv_bytes_per_token=512.0,
            arena_bytes_per_token=4096.0,
        ),
        dims=DIMS,
        kv_tokens=kv_tokens,
    )


def make_trace(**changes: Any) -> Trace:
    fields: dict[str, Any] = {
        "name": "test",
        "num_requests": 200,
        "arrivals": {"rate_per_s": 20},
        "prompt_tokens": {"kind": "lognormal", "mean": 40, "sigma": 0.8, "low": 1, "high": 200},
        "output_tokens": {"kind": "uniform", "low": 1, "high": 40},
    }
    if "duration_s" in changes:
        del fields["num_requests"]
    return Trace.model_validate(fields | changes)


def make_profile(spread=0.06) -> Profile:
    """Of a device that costs what `KnownDevice` does, with noise between 1 - spread / 2 and 1 + spread / 2."""
    device = KnownDevice()
    ratios = tuple(1 - spread / 2 + spread * level for level in QUANTILE_LEVELS)
    error = FitError(num_rows=100, median=0.01, p95=0.03)
    slices = {kind: (0.3 * cost_s, cost_s / 512) for kind, cost_s in _SLICE_COST_S.items()}
    return Profile(
        origin=Origin(device="made up", model="made up", num_threads=1),
        latency=LatencyModel(
            forward=(0.008, 1e-4, 1e-6, 5e-5, 1e-8, 0.0),
            typical=(1, 64, 64_000, 2048, 4_000_000, 8),
            slices=slices,
        ),
        memory=MemoryModel(arena_bytes=1 << 20, arena_bytes_per_token=4096.0, kv_bytes_per_token=512),
        forward_error=error,
        slice_errors=dict.fromkeys(slices, error),
        forward_ratios=ratios,
        slice_ratios=dict.fromkeys(slices, ratios),
        forward_noise=ratios,
        slice_noise=dict.fromkeys(slices, ratios),
        overhead_s=device.overhead_s,
        overhead_quantiles_s=tuple(device.overhead_s * ratio for ratio in ratios),
        samples=RawSamples(),
    )
