"""What the planner sees of vLLM's scheduler: lists of requests in, `IterationView` and `ForwardShape` out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core.batch import ForwardShape
from engine.vllm.planning import KvPool
from engine.vllm.waiting_queue import AgeingRequestQueue
from scheduler.plan import FineTuneState, IterationView, PrefillTask, PruneOffer


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
    cached_prefix_of: Callable[[Any], tuple[int, int]] | None = None,
) -> IterationView:
    """The state before an iteration is scheduled.

    Args:
        now_s: wall clock, like `Request.arrival_time`.
        running: vLLM's running requests, decoding or with prompt tokens left.
        waiting: the waiting queue.
        free_seats: waiting requests that may still start.
        pool: the KV cache.
        free_kv_blocks: its blocks that can be given out now.
        finetune: fine-tune work of this engine; None if there is none.
        prune_offer: KV blocks that may be dropped; None if there are none.
        cached_prefix_of: leading tokens of a waiting request that are cached, and of these, those in blocks that
            somebody holds. Asked for those that may start.
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
    view.num_decode, view.decode_tokens, view.decode_context = num_decode, decode_tokens, decode_context
    view.decode_blocks = decode_blocks
    head = [
        _waiting(request, cached_prefix_of if number < free_seats else None)
        for number, request in enumerate(waiting.head(view.num_unlooked))
    ]
    view.add_waiting(head, len(waiting), waiting.oldest_arrival_s())
    return view


def shape_of(num_scheduled_tokens: Mapping[str, int], requests: Mapping[str, Any]) -> ForwardShape:
    """The forward pass that vLLM scheduled.

    Args:
        num_scheduled_tokens: by request id, as in `SchedulerOutput`.
        requests: vLLM's requests; their `num_computed_tokens` already includes what was scheduled.
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
    shape.num_decode, shape.decode_context = num_decode, max(0, decode_context)
    return shape


def is_decoding(request: Any, num_computed_tokens: int) -> bool:
    """Whether only the newest token (and drafts after it) is left to compute; a resumed request prefills again."""
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
        request.request_id,
        request.arrival_time,
        num_tokens,
        context_tokens,
        request.priority,
        is_running,
    )
