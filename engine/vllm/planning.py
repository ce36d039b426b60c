"""Builds the production planner for one engine: its limits, memory, and what is known of the device."""

import logging
from dataclasses import dataclass
from typing import Any

from core.config import AppArgs
from core.dpo_slices import HEAD_CHUNK_TOKENS
from core.errors import ConfigError, ProfileError
from profiler.online import OnlineLatencyModel
from profiler.profile import Profile
from scheduler.iteration.planner import EngineLimits, IterationPlanner
from scheduler.memory.arena_need import ModelDims
from scheduler.memory.ledger import MemoryLedger

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KvPool:
    """vLLM's KV cache as a number of blocks, each of which holds all layers' keys and values of its tokens.

    A model whose layers are of several kinds (full attention and a sliding window) has a block table for each: vLLM
    then gives out `num_groups` blocks where one is meant here.
    """

    num_blocks: int
    """That can be given out; vLLM keeps one more as the null block."""
    block_bytes: int
    block_tokens: int
    num_groups: int = 1

    def free_blocks(self, num_free: int) -> int:
        """Of so many free ones of vLLM's (the null block is none of them)."""
        return min(num_free // self.num_groups, self.num_blocks)


def kv_pool_of(kv_cache_config: Any) -> KvPool:
    """The pool that vLLM has laid out (its `KVCacheConfig`): groups overlay each other in one allocation."""
    total_bytes = max((tensor.size for tensor in kv_cache_config.kv_cache_tensors), default=0)
    groups = kv_cache_config.kv_cache_groups
    num_blocks, num_groups = int(kv_cache_config.num_blocks), max(1, len(groups))
    block_tokens = min((group.kv_cache_spec.block_size for group in groups), default=1)
    block_bytes = num_groups * (total_bytes // max(1, num_blocks))
    return KvPool(max(1, (num_blocks - 1) // num_groups), block_bytes, block_tokens, num_groups)


def build_planner(args: AppArgs, scheduler: Any, pool: KvPool, *, can_prune: bool = False) -> IterationPlanner:
    """The planner of one engine.

    Args:
        args: the application's settings; `profile.path` names the profile to start from, if it exists.
        scheduler: the vLLM scheduler that will apply the plans.
        pool: its KV cache.
        can_prune: KV blocks may be dropped (`engine.pruning.pruner`).
    """
    profile = _load_profile(args)
    vllm = scheduler.scheduler_config
    limits = EngineLimits(
        max_tokens=scheduler.max_num_scheduled_tokens,
        max_slice_tokens=args.training.max_slice_tokens,
        kv_bytes_per_token=pool.block_bytes / pool.block_tokens,
        arena_bytes_per_token=0.0 if profile is None else profile.memory.arena_bytes_per_token,
        arena_fixed_bytes=0.0 if profile is None else profile.memory.arena_bytes,
        # Block-aligned chunks and images that must not be split would never start on a small budget.
        can_chunk_prefills=(
            bool(vllm.enable_chunked_prefill)
            and not vllm.disable_chunked_mm_input
            and not scheduler.need_mamba_block_aligned_split
        ),
        dims=_dims_of(scheduler.vllm_config.model_config, args) if args.training.enabled else None,
    )
    memory = MemoryLedger(
        kv_bytes=pool.num_blocks * pool.block_bytes,
        arena_bytes=args.training.arena_bytes or 0,  # until the worker says what is free
        tau_mem=args.scheduler.tau_mem,
    )
    return IterationPlanner(
        config=args.scheduler,
        slo=args.slo,
        predictor=OnlineLatencyModel(profile),
        limits=limits,
        memory=memory,
        pruning=args.kv_pruning if can_prune else None,
    )


def _dims_of(model: Any, args: AppArgs) -> ModelDims | None:
    """Sizes that a training step's memory is predicted from; None if the configuration lacks one."""
    try:
        return ModelDims.of(
            model.hf_text_config.to_dict(),
            dtype_bytes=model.dtype.itemsize,
            lora_rank=args.lora.rank,
            head_chunk_tokens=HEAD_CHUNK_TOKENS,
        )
    except ConfigError as error:
        logger.warning("memory of training is learnt from its first steps: %s", error)
        return None


def _load_profile(args: AppArgs) -> Profile | None:
    """The profile to start from. A damaged one is a warning: the engine learns from its own iterations anyway."""
    path = args.profile.path
    if path is None or not path.exists():
        return None
    try:
        return Profile.load(path)
    except ProfileError as error:
        logger.warning("profile ignored: %s", error)
        return None
