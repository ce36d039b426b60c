"""vLLM's own KV cache manager with small blocks, and requests on it."""

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

BLOCK = 4
NUM_BLOCKS = 64


def make_manager(spec=None, **options):
    """Of one group of layers; `spec`: of another kind than full attention."""
    init_none_hash(sha256)
    spec = spec or FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    config = KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)], hash_block_size=BLOCK)
    return KVCacheManager(config, max_model_len=1024, scheduler_block_size=BLOCK, hash_block_size=BLOCK, **options)


def make(name, prompt, arguments=None):
    """A request that waits."""
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(max_tokens=100, extra_args=arguments),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def run(manager, name, prompt, arguments=None):
    """A request whose prompt is computed, with its cache hits in tokens."""
    request = make(name, prompt, arguments)
    computed, num_hits, *_ = manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, request.num_tokens - num_hits, num_hits, computed) is not None
    request.num_computed_tokens = request.num_tokens
    return request, num_hits
