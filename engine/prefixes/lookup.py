"""How much of a waiting prompt is in the prefix cache: the planner sizes chunks by what is left to compute."""

from bisect import bisect_left
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec


class PrefixLookup:
    """Looks without taking: vLLM decides when it schedules the request.

    A cache evicts a prompt's end before its beginning, so the blocks that are left are the first ones and a binary
    search finds how many: a walk along every long prompt in line would cost milliseconds in each iteration. Where that
    is not so (two prompts that part and were evicted in turns) the answer is a guess, of which only a plan's size
    depends. With several kinds of layers, or a window, nothing is said to be cached.
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
