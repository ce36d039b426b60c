"""Our scheduler over vLLM's async one, with vLLM's own configuration and KV cache, built in this process."""

import os
from contextlib import contextmanager

import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from core.config import AppArgs
from core.types import FineTuneTask, TaskKind, TokenizedPair
from engine.vllm.compat import make_engine_args
from engine.vllm.directive import CLIENT_KEY, TASK_KEY
from engine.vllm.scheduler import AsyncHybridScheduler

BLOCK_TOKENS = 16
ARENA_BYTES = 64 << 20


@contextmanager
def async_config(model_dir, **sections):
    """vLLM's configuration for settings of ours."""
    before = dict(os.environ)
    sections = {"model": {"max_model_len": 256}, "training": {"arena_bytes": ARENA_BYTES}, **sections}
    config = make_engine_args(AppArgs.model_validate(sections), str(model_dir)).create_engine_config()
    config.scheduler_config.async_scheduling = True
    init_none_hash(sha256)
    config.cache_config.block_size = BLOCK_TOKENS
    config.cache_config.kv_cache_layout = "LBNHC"
    config.kv_events_config = None
    try:
        yield config
    finally:
        os.environ.clear()
        os.environ.update(before)


def make_scheduler(vllm_config, num_blocks=200):
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)
    kv_cache = get_kv_cache_config_from_groups(
        vllm_config, [KVCacheGroupSpec(["layer"], spec)], num_blocks * spec.page_size_bytes
    )
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    return AsyncHybridScheduler(
        vllm_config=vllm_config,
        kv_cache_config=kv_cache,
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK_TOKENS,
        hash_block_size=BLOCK_TOKENS,
    )


def make_request(name, num_prompt, max_tokens, arrived_s, client=None, regex=None):
    params = SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, extra_args={CLIENT_KEY: client} if client else None
    )
    if regex is not None:
        params.structured_outputs = StructuredOutputsParams(regex=regex)
        params.structured_outputs._backend = "xgrammar"  # noqa: SLF001 - as the front end's check chooses it
    return Request(
        request_id=name,
        prompt_token_ids=[sum(map(ord, name)) + position for position in range(num_prompt)],
        sampling_params=params,
        pooling_params=None,
        arrival_time=arrived_s,
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
    )


def make_task(name):
    task = FineTuneTask(name, TaskKind.TRAIN, (TokenizedPair("p", (1, 2), (3, 4), (5, 6)),))
    params = SamplingParams(max_tokens=1, extra_args={TASK_KEY: task.to_wire()})
    return Request(request_id=name, prompt_token_ids=[0], sampling_params=params, pooling_params=None)
