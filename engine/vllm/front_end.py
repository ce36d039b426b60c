"""The front-end process's own knowledge of its engine, without a call into it: its load, and every prompt.

Both come from vLLM's output processor. It is the first place that knows a prompt's token ids (after the chat template,
before the engine process), and it keeps the state of every unfinished request.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

CachedTokens = Callable[[str | None, Sequence[int]], int]
"""Tokens at the start of a prompt that are in the prefix cache, from adapter name (None: base) and token ids."""

SeePrompt = Callable[[str | None, Sequence[int]], None]
"""Takes adapter name (None: the base model) and token ids of a request."""

OWN_REQUESTS = ("finetune-", "generate-", "profile-")
"""Prefixes of the ids of requests that no user sent; vLLM's own start with `chatcmpl-`, `cmpl-` or `resp_`."""

_MAX_LOOKUPS = 256
"""Waiting prompts that are looked up for one reading, 8 us for a thousand tokens; the others count in full."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """KV memory and queue of an engine at one moment."""

    free_kv_bytes: float
    """A lower bound: blocks that requests share count once for each, and a waiting prompt counts as if computed."""
    kv_capacity_bytes: float
    kv_bytes_per_token: float
    waiting_tokens: int
    """Prompt tokens still to compute of requests without a first token; an upper bound."""
    num_running: int


def read_engine_load(client: Any, cached_tokens: CachedTokens | None = None) -> EngineLoad:
    """Read the load of a started `AsyncLLM`. Fine-tune tasks count as requests of one token.

    `cached_tokens` takes from waiting prompts what is in the prefix cache: prefixes of others, and the chunks that
    they had already computed themselves. Without it they count in full.
    """
    config = client.vllm_config
    capacity_tokens = config.cache_config.kv_cache_size_tokens
    used_tokens = waiting_tokens = num_running = num_lookups = 0
    for state in list(client.output_processor.request_states.values()):
        used_tokens += state.prompt_len
        if state.is_prefilling:
            waiting_tokens += state.prompt_len
            if cached_tokens is not None and state.prompt_token_ids and num_lookups < _MAX_LOOKUPS:
                num_lookups += 1
                # The last token is always computed.
                waiting_tokens -= min(state.prompt_len - 1, cached_tokens(state.lora_name, state.prompt_token_ids))
        else:
            num_running += 1
            used_tokens += state.detokenizer.num_output_tokens() if state.detokenizer is not None else 0
    token_bytes = kv_bytes_per_token(config)
    return EngineLoad(
        free_kv_bytes=max(0, capacity_tokens - used_tokens) * token_bytes,
        kv_capacity_bytes=capacity_tokens * token_bytes,
        kv_bytes_per_token=token_bytes,
        waiting_tokens=waiting_tokens,
        num_running=num_running,
    )


def kv_bytes_per_token(config: Any) -> int:
    """Keys and values of one token in all layers, in the model's own precision."""
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_kv_heads(parallel) * model.get_num_layers(parallel)
    return int(2 * heads * model.get_head_size() * model.dtype.itemsize)


def watch_prompts(client: Any, see: SeePrompt) -> None:
    """Call `see` for each request that comes to a started `AsyncLLM` from now on, once however many answers it wants.

    Left out are our own requests, and those whose keys nobody else can read: with a cache salt, images or embeddings.
    The output processor registers a request in one call, on the event loop. What `see` raises is logged and keeps
    nobody from an answer.
    """
    processor = client.output_processor
    register = processor.add_request

    def register_and_see(
        request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, *args: Any, **kwargs: Any
    ) -> None:
        register(request, prompt, parent_req, request_index, *args, **kwargs)
        if request_index == 0 and _is_sharable(request):
            lora = request.lora_request
            try:
                see(lora.lora_name if lora is not None else None, request.prompt_token_ids)
            except Exception:  # an observer must not cost a request
                logger.exception("a prompt could not be looked at")

    processor.add_request = register_and_see


def _is_sharable(request: Any) -> bool:
    if request.cache_salt or request.mm_features or request.prompt_embeds is not None:
        return False
    return bool(request.prompt_token_ids) and not (request.external_req_id or "").startswith(OWN_REQUESTS)
