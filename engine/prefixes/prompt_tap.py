"""Sees every prompt on its way into vLLM, as token ids: after the chat template, before the engine process."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

SeePrompt = Callable[[str | None, Sequence[int]], None]
"""Adapter name (None: the base model) and token ids of a request."""

OWN_REQUESTS = ("finetune-", "generate-", "profile-")
"""How the ids of requests begin that are not anybody's; vLLM's own start with `chatcmpl-`, `cmpl-` or `resp_`."""


def watch_prompts(client: Any, see: SeePrompt) -> None:
    """Call `see` for each request that comes to a started `AsyncLLM` from now on, once however many answers it wants.

    Left out are our own requests, and those whose keys nobody else can read: with a cache salt, images or embeddings.
    The output processor is the first place that knows a prompt's ids; it registers a request in one call, on the
    event loop. What `see` raises is logged and keeps nobody from an answer.
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
