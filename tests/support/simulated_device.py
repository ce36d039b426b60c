"""A device of known costs, and short traces on it."""

from types import SimpleNamespace
from typing import Any

from core.batch import ForwardShape
from core.types import SliceKind
from profiler.models import LatencyModel, MemoryModel
from profiler.profile import QUANTILE_LEVELS, FitError, Origin, Profile, RawSamples
from simulator.device import Quantiles
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
    """Affine costs; also the perfect predictor of itself."""

    overhead_s = 0.001
    overhead_noise = Quantiles((0, 0.5, 1), (0.0005, 0.001, 0.003))
    forward_noise = Quantiles((0, 0.25, 0.5, 0.75, 1), (0.9, 0.95, 1.0, 1.05, 1.2))

    def __init__(self):
        self.num_observed = 0

    def slice_noise(self, kind: SliceKind) -> Quantiles:
        return Quantiles((0, 0.5, 1), (0.9, 1.0, 1.1))

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


STEP_MODEL = SimpleNamespace(num_layers=3, layer_weights=100_000, head_weights=200_000)


def make_hardware(device=None, *, new_predictor=KnownDevice, kv_tokens=20_000, step_model=STEP_MODEL) -> Hardware:
    return Hardware(
        device=device or KnownDevice(),
        new_predictor=new_predictor,
        step_model=step_model,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=512.0,
        arena_bytes=1 << 28,
        arena_bytes_per_token=4096.0,
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


def make_profile() -> Profile:
    """Of a device that costs what `KnownDevice` does, with a little noise."""
    device = KnownDevice()
    ratios = tuple(0.97 + 0.06 * level for level in QUANTILE_LEVELS)
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
