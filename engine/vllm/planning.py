"""The production planner of one engine, and what it sees: vLLM's requests in, `IterationView` and `ForwardShape` out.

Tokens of dropped KV blocks are taken off here, once for the view and once for the shape: attention does not read them,
although vLLM counts them as computed.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from core.batch import ForwardShape
from core.config import AppArgs
from core.errors import ConfigError, ProfileError
from core.model_dims import ModelDims
from engine.vllm.waiting_queue import AgeingRequestQueue
from profiler.online import OnlineLatencyModel
from profiler.profile import Profile
from scheduler.iteration.planner import EngineLimits, IterationPlanner
from scheduler.view import FineTuneState, IterationView, PrefillTask, PruneOffer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KvPool:
    """vLLM's KV cache as a number of blocks, each of which holds all layers' keys and values of its tokens.

    A model whose layers are of several kinds (full attention and a sliding window) has a block table for each: vLLM
    then gives out `num_groups` blocks where one is meant here.
    """

    num_blocks: int
    """Blocks that can be given out; vLLM keeps one more as the null block."""
    block_bytes: int
    block_tokens: int
    num_groups: int = 1

    @classmethod
    def of(cls, kv_cache_config: Any) -> "KvPool":
        """The pool that vLLM has laid out (its `KVCacheConfig`): groups overlay each other in one allocation."""
        total_bytes = max((tensor.size for tensor in kv_cache_config.kv_cache_tensors), default=0)
        groups = kv_cache_config.kv_cache_groups
        num_blocks, num_groups = int(kv_cache_config.num_blocks), max(1, len(groups))
        block_tokens = min((group.kv_cache_spec.block_size for group in groups), default=1)
        block_bytes = num_groups * (total_bytes // max(1, num_blocks))
        return cls(max(1, (num_blocks - 1) // num_groups), block_bytes, block_tokens, num_groups)

    def free_blocks(self, num_free: int) -> int:
        """Free blocks, from the number of vLLM's free ones (the null block is none of them)."""
        return min(num_free // self.num_groups, self.num_blocks)


def build_planner(args: AppArgs, scheduler: Any, pool: KvPool, *, can_prune: bool = False) -> IterationPlanner:
    """The planner of one engine, whose vLLM `scheduler` applies the plans; `profile.path` is where it starts from."""
    profile = _load_profile(args)
    vllm = scheduler.scheduler_config
    limits = EngineLimits(
        max_tokens=scheduler.max_num_scheduled_tokens,
        kv_bytes=pool.num_blocks * pool.block_bytes,
        kv_bytes_per_token=pool.block_bytes / pool.block_tokens,
        arena_fixed_bytes=0.0 if profile is None else profile.memory.arena_bytes,
        arena_bytes_per_token=0.0 if profile is None else profile.memory.arena_bytes_per_token,
        dims=_dims_of(scheduler.vllm_config.model_config) if args.training.enabled else None,
        # Block-aligned chunks and images that must not be split would never start on a small budget.
        can_chunk_prefills=(
            bool(vllm.enable_chunked_prefill)
            and not vllm.disable_chunked_mm_input
            and not scheduler.need_mamba_block_aligned_split
        ),
        can_prune=can_prune,
    )
    return IterationPlanner(args, OnlineLatencyModel(profile), limits)


def _dims_of(model: Any) -> ModelDims | None:
    """Sizes that a training step's memory is predicted from; None if the configuration lacks one."""
    try:
        return ModelDims.of(model.hf_text_config.to_dict(), dtype_bytes=model.dtype.itemsize)
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


class PrefixLookup:
    """The part of a waiting prompt that is in the prefix cache: the planner sizes chunks by what is left to compute.

    Looks without taking: vLLM decides when it schedules the request. A cache evicts a prompt's end before its
    beginning, so the blocks that are left are the first ones and a binary search finds how many: a walk along every
    long prompt in line would cost milliseconds in each iteration. Where that is not so (two prompts that part and were
    evicted in turns) the answer is a guess, of which only a plan's size depends. With several kinds of layers, or a
    window, nothing is said to be cached.
    """

    def __init__(self, kv_cache_manager: Any, block_tokens: int) -> None:
        self._manager = kv_cache_manager
        self._pool = kv_cache_manager.block_pool
        self._block_tokens = block_tokens
        groups = kv_cache_manager.kv_cache_config.kv_cache_groups
        self._can_tell = len(groups) == 1 and isinstance(groups[0].kv_cache_spec, FullAttentionSpec)

    def __call__(self, request: Any) -> tuple[int, int]:
        """Leading tokens of a waiting request that are cached, and of these, those in blocks that somebody holds."""
        if not self._can_tell or not self._manager.prefix_cache_lookup_enabled(request):
            return 0, 0
        hashes = request.block_hashes
        at_most = min(len(hashes), (request.num_tokens - 1) // self._block_tokens)  # vLLM computes one in any case
        if at_most <= 0 or self._block(hashes[0]) is None:  # the usual case first
            return 0, 0
        num_cached = bisect_left(range(at_most), True, key=lambda number: self._block(hashes[number]) is None)
        num_held = bisect_left(range(num_cached), True, key=lambda number: not self._is_held(hashes[number]))
        return num_cached * self._block_tokens, num_held * self._block_tokens

    def _block(self, block_hash: Any) -> Any:
        found = self._pool.get_cached_block(block_hash, [0])
        return found[0] if found else None

    def _is_held(self, block_hash: Any) -> bool:
        block = self._block(block_hash)
        return block is not None and block.ref_cnt > 0


def view_of(
    now_s: float,
    running: Sequence[Any],
    waiting: AgeingRequestQueue,
    *,
    free_seats: int,
    pool: KvPool,
    free_kv_blocks: int,
    finetune: FineTuneState | None,
    prune_offer: PruneOffer | None = None,
    num_absent_tokens: int = 0,
    cached_prefix_of: Callable[[Any], tuple[int, int]] | None = None,
) -> IterationView:
    """The state before an iteration is scheduled.

    `now_s` is wall clock, like `Request.arrival_time`; `num_absent_tokens` are those of the decoding requests in
    dropped blocks; `cached_prefix_of` (see `PrefixLookup`) is asked for those that may start.
    """
    view = IterationView(
        now_s,
        free_seats=free_seats,
        used_kv_bytes=(pool.num_blocks - free_kv_blocks) * pool.block_bytes,
        free_kv_blocks=free_kv_blocks,
        block_tokens=pool.block_tokens,
        prune_offer=prune_offer,
        finetune=finetune,
    )
    block_tokens = pool.block_tokens
    num_decode = decode_tokens = decode_context = decode_blocks = 0
    for request in running:
        computed = request.num_computed_tokens
        pending = request.num_output_placeholders
        if pending and _ends_in_flight(request, computed, pending):
            continue
        left = request.num_tokens_with_spec + pending - computed
        if left == 1 or is_decoding(request, computed):  # the usual case first: this loop runs in every iteration
            num_decode += 1
            decode_tokens += left
            decode_context += computed
            if computed % block_tokens == 0:
                decode_blocks += 1
        else:
            view.add_running(_prefill(request, left, computed, is_running=True))
    view.num_decode, view.decode_tokens, view.decode_blocks = num_decode, decode_tokens, decode_blocks
    view.decode_context = max(0, decode_context - num_absent_tokens)
    head = [
        _waiting(request, cached_prefix_of if number < free_seats else None)
        for number, request in enumerate(waiting.head(view.num_unlooked))
    ]
    view.add_waiting(head, len(waiting), waiting.oldest_arrival_s())
    return view


def shape_of(
    num_scheduled_tokens: Mapping[str, int], requests: Mapping[str, Any], num_absent_tokens: int = 0
) -> ForwardShape:
    """The forward pass that vLLM scheduled, from tokens by request id.

    The `num_computed_tokens` of `requests` already includes what was scheduled.
    """
    shape = ForwardShape()
    num_decode = decode_context = 0
    for request_id, num_tokens in num_scheduled_tokens.items():
        request = requests[request_id]
        start = request.num_computed_tokens - num_tokens
        if num_tokens == 1 or is_decoding(request, start):
            num_decode += num_tokens
            decode_context += start
        else:
            shape.add_chunk(num_tokens, max(0, start))
    shape.num_decode, shape.decode_context = num_decode, max(0, decode_context - num_absent_tokens)
    return shape


def is_decoding(request: Any, num_computed_tokens: int) -> bool:
    """True if only the newest token (and drafts after it) is left to compute; a resumed request prefills again."""
    return num_computed_tokens >= request.num_tokens - 1


def _ends_in_flight(request: Any, computed: int, pending: int) -> bool:
    """Async scheduling: the last token it may have is being computed, so vLLM does not schedule it (the same test).

    A token budget that counted it would leave one to spare, and a prompt that is starved of KV blocks would take it.
    """
    return bool(computed + 2 - pending >= request.num_prompt_tokens + request.max_tokens)


def _waiting(request: Any, cached_prefix_of: Callable[[Any], tuple[int, int]] | None) -> PrefillTask:
    context = held = request.num_computed_tokens  # above 0 if somebody else has loaded its keys
    if not context and cached_prefix_of is not None:
        context, held = cached_prefix_of(request)
    task = _prefill(request, request.num_tokens - context, context, is_running=False)
    task.held_tokens = held
    return task


def _prefill(request: Any, num_tokens: int, context_tokens: int, *, is_running: bool) -> PrefillTask:
    return PrefillTask(
        request.request_id, request.arrival_time, num_tokens, context_tokens, request.priority, is_running
    )
