"""From a measured profile and a model's dimensions to the hardware of a simulation."""

from core.batch import ForwardShape
from core.config import AppArgs
from core.errors import ConfigError
from core.model_dims import ModelDims
from core.types import SliceKind
from profiler.online import OnlineLatencyModel
from profiler.profile import QUANTILE_LEVELS, Profile
from simulator.device import Quantiles
from simulator.hardware import Hardware

_BLOCK_TOKENS = 16
"""vLLM's block on CUDA; `engine.engine_kwargs.block_size` says otherwise."""


class ProfiledDevice:
    """`simulator.device.DeviceModel` of a profile."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        model = OnlineLatencyModel(profile)  # learns nothing: it is the profile's model, in its fast form
        self._forward_s = model.forward_s
        self.slice_s = model.slice_s
        self.overhead_s = profile.overhead_s
        self.overhead_noise = Quantiles(QUANTILE_LEVELS, profile.overhead_quantiles_s)
        self.forward_noise = Quantiles(QUANTILE_LEVELS, profile.forward_noise)

    def slice_noise(self, kind: SliceKind) -> Quantiles:
        """Measured latency of slices of a kind over that of their like."""
        noise = self._profile.slice_noise.get(kind)
        return Quantiles.exactly(1.0) if noise is None else Quantiles(QUANTILE_LEVELS, noise)

    def forward_s(self, shape: ForwardShape) -> float:
        """Latency of a forward pass in seconds; 0 if it is empty."""
        return self._forward_s(shape) or 0.0


def hardware_of(profile: Profile, dims: ModelDims, args: AppArgs) -> Hardware:
    """An executor on the profile's device.

    Args:
        profile: latency and memory of the device.
        dims: the model that was profiled.
        args: settings; `engine.kv_cache_memory_bytes` must be given, there is no device to ask.

    Raises:
        ConfigError: the size of the KV cache is not given.
    """
    if args.engine.kv_cache_memory_bytes is None:
        raise ConfigError("engine.kv_cache_memory_bytes is needed in the trace's args: there is no device to ask")
    kv_bytes = profile.memory.kv_bytes_per_token or dims.kv_bytes_per_token
    largest = args.training.max_slice_tokens + 2 * args.training.max_length_tokens
    return Hardware(
        device=ProfiledDevice(profile),
        new_predictor=lambda: OnlineLatencyModel(profile),
        step_model=dims,
        kv_tokens=int(args.engine.kv_cache_memory_bytes / kv_bytes),
        kv_bytes_per_token=kv_bytes,
        arena_bytes=int(2 * profile.memory.step_bytes(largest)),
        arena_bytes_per_token=profile.memory.arena_bytes_per_token,
        arena_fixed_bytes=profile.memory.arena_bytes,
        dims=dims if args.training.enabled else None,
        block_tokens=int(args.engine.engine_kwargs.get("block_size") or _BLOCK_TOKENS),
    )
