"""The parts of a simulated executor: a device, its memory, and what the planner knows of it at the start."""

from collections.abc import Callable
from dataclasses import dataclass

from core.batch import IterationSample
from core.config import AppArgs
from core.dpo_slices import HEAD_CHUNK_TOKENS
from core.errors import ConfigError
from core.model_dims import ModelDims
from core.ports import LatencyPredictor
from profiler.online import OnlineLatencyModel
from profiler.profile import Profile
from scheduler.iteration.planner import EngineLimits
from scheduler.memory.arena import ArenaModel, ArenaNeed

_BLOCK_TOKENS = 16
"""vLLM's block on CUDA; `engine.engine_kwargs.block_size` says otherwise."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of executor; all executors of a run are alike."""

    profile: Profile
    """True cost of iterations."""
    new_predictor: Callable[[], LatencyPredictor]
    """Makes the predictor that production would start from: one for each executor, because it learns."""
    limits: EngineLimits
    """Predictions that the planner is given."""
    dims: ModelDims
    kv_tokens: int
    block_tokens: int = 1
    """Tokens of a KV block; `kv_tokens` are rounded down to whole blocks."""


class FrozenPredictor:
    """A predictor that learns nothing: the profile as it was measured, whatever the device does now."""

    def __init__(self, predictor: LatencyPredictor) -> None:
        self.overhead_s = predictor.overhead_s
        self.forward_s, self.forward_upper_s = predictor.forward_s, predictor.forward_upper_s
        self.slice_s, self.slice_upper_s = predictor.slice_s, predictor.slice_upper_s

    def observe(self, sample: IterationSample) -> None:
        """Learn nothing."""


def hardware_of(profile: Profile, dims: ModelDims, args: AppArgs) -> Hardware:
    """Describe an executor on the profile's device.

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
    kv_tokens = int(args.engine.kv_cache_memory_bytes / kv_bytes)
    largest = args.training.max_slice_tokens + 2 * args.training.max_length_tokens
    fixed, per_token = profile.memory.arena_bytes, profile.memory.arena_bytes_per_token
    arena = ArenaModel(fixed, per_token, ArenaNeed(dims, args.lora.rank, HEAD_CHUNK_TOKENS))
    return Hardware(
        profile=profile,
        new_predictor=lambda: OnlineLatencyModel(profile),
        limits=EngineLimits(
            max_tokens=args.engine.max_num_batched_tokens,
            kv_bytes=int(kv_tokens * kv_bytes),
            arena_bytes=2 * arena.predict(largest),
            kv_bytes_per_token=kv_bytes,
            arena_fixed_bytes=fixed,
            arena_bytes_per_token=per_token,
            dims=dims if args.training.enabled else None,
        ),
        dims=dims,
        kv_tokens=kv_tokens,
        block_tokens=int(args.engine.engine_kwargs.get("block_size") or _BLOCK_TOKENS),
    )
