"""The scheduler side of KV pruning: decides which KV blocks to give up, and gives them up.

A dropped block becomes vLLM's null block in the request's list and goes back to the pool at once; the worker does the
same to its row before the next forward pass (`engine.pruning.worker`). Always kept: the first tokens (attention
sinks), the recent window, blocks that other requests share or that came from the prefix cache when the request
first started, blocks of requests that said `vllm_xargs: {"kv_pruning": false}`, and whatever is not full. Prompts are
computed in full first.

What is computed after the first drop has seen a shortened context, so it is never offered to other requests: from the
first dropped block on, the request's own blocks leave vLLM's prefix index, and later ones never enter it. A preempted
request loses all its blocks, is computed anew in full, and may be pruned again.

Freed blocks may be handed out in the same iteration: with async scheduling the forward pass in flight still reads
them, but on the same stream, before anything is written to them.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from core.config import KV_PRUNING_OPT_OUT, KV_PRUNING_SINK_TOKENS, KvPruningConfig
from scheduler.view import PruneOffer

_MAX_SCORED = 8
"""Requests whose blocks are scored in one iteration: it costs the worker a gather per layer each."""

_BACKENDS = ("FLASH_ATTN", "CPU_ATTN")
_ALIBI_MODELS = ("bloom", "mpt")

_MAX_OFFERED = 512
"""Blocks on offer in one iteration: merging thousands would cost it milliseconds."""

_NEVER = 1 << 30
"""vLLM's count of cached blocks for requests whose blocks must not enter the prefix index."""


@dataclass(slots=True)
class _Track:
    """State of one running request."""

    num_dropped: int = 0
    asked_at: int = -1
    """Full blocks when its scores were asked for last."""
    candidates: list[tuple[float, str, int]] = field(default_factory=list)
    """Harm, request id and position of blocks that may go, least harm first: ready to be merged with others."""


class KvPruner:
    """Drops the blocks of least harm from vLLM's KV cache manager."""

    def __init__(
        self,
        config: KvPruningConfig,
        kv_cache_manager: Any,
        block_tokens: int,
        sink_tokens: int = KV_PRUNING_SINK_TOKENS,
    ) -> None:
        self._config = config
        self._pool = kv_cache_manager.block_pool
        self._manager = kv_cache_manager.coordinator.single_type_managers[0]
        self._block_tokens = block_tokens
        self._num_sinks = -(-sink_tokens // block_tokens)
        self._num_recent = -(-config.recent_tokens // block_tokens)
        self._tracks: dict[str, _Track] = {}
        self._prefix_blocks: dict[str, int] = {}
        self.num_dropped = 0
        """Blocks dropped since the start."""
        self.num_requests = 0
        """Requests that lost a block; one that was preempted counts again."""

    @property
    def num_absent_tokens(self) -> int:
        """Tokens of running requests that attention does not see any more."""
        return self._block_tokens * sum(track.num_dropped for track in self._tracks.values())

    def note_prefix_hit(self, request_id: str, num_tokens: int) -> None:
        """A new request found its first tokens in the prefix cache: others may want them again, so they stay."""
        if num_tokens:
            self._prefix_blocks[request_id] = num_tokens // self._block_tokens

    def to_score(self, running: Iterable[Any]) -> list[str]:
        """Choose the requests whose blocks are scored with the next forward pass."""
        wanted: list[str] = []
        for request in running:
            full = self._full_blocks(request)
            track = self._tracks.get(request.request_id)
            dropped, asked_at = (0, -1) if track is None else (track.num_dropped, track.asked_at)
            if full == asked_at or int(self._config.max_fraction * full) <= dropped:
                continue
            if full - self._num_recent <= self._num_sinks or _opted_out(request):
                continue
            self._tracks.setdefault(request.request_id, _Track()).asked_at = full
            wanted.append(request.request_id)
            if len(wanted) == _MAX_SCORED:
                break
        return wanted

    def note_scores(self, scores: Mapping[str, Sequence[tuple[int, float]]], requests: Mapping[str, Any]) -> None:
        """Take in scores (position in the row, higher is kept), as the worker reports them."""
        for request_id, rows in scores.items():
            request, track = requests.get(request_id), self._tracks.get(request_id)
            if request is not None and track is not None:
                track.candidates = self._candidates(request, rows, track.num_dropped)

    def offer(self) -> PruneOffer | None:
        """Offer the blocks that may be dropped now, least harm first; None if none is known to be droppable."""
        # A block may have found a second reader since it was scored.
        held_alone = (harm for harm, request_id, position in self._merged() if self._block(request_id, position))
        costs = list(islice(held_alone, _MAX_OFFERED))
        return PruneOffer(costs) if costs else None

    def prune(self, count: int, requests: Mapping[str, Any]) -> dict[str, list[int]]:
        """Drop up to `count` blocks, least harm first; their positions by request, for the worker."""
        dropped: dict[str, list[int]] = {}
        for _, request_id, position in self._merged():
            if count <= 0:
                break
            block = self._block(request_id, position) if request_id in requests else None
            if block is None:  # shared, or gone, by now
                continue
            self._manager.req_to_blocks[request_id][position] = self._pool.null_block
            self._pool.evict_blocks({block.block_id})
            self._pool.free_blocks([block])
            dropped.setdefault(request_id, []).append(position)
            count -= 1
        for request_id, positions in dropped.items():
            self._leave_prefix_index(request_id, min(positions))
            track, gone = self._tracks[request_id], set(positions)
            self.num_requests += track.num_dropped == 0
            track.num_dropped += len(gone)
            track.candidates = [entry for entry in track.candidates if entry[2] not in gone]
        self.num_dropped += sum(map(len, dropped.values()))
        return dropped

    def forget(self, request_id: str, *, has_ended: bool) -> None:
        """The request's blocks are free: it ended or was preempted."""
        self._tracks.pop(request_id, None)
        if has_ended:
            self._prefix_blocks.pop(request_id, None)

    def _candidates(
        self, request: Any, rows: Sequence[tuple[int, float]], num_dropped: int
    ) -> list[tuple[float, str, int]]:
        full = self._full_blocks(request)
        allowed = int(self._config.max_fraction * full) - num_dropped
        first = max(self._num_sinks, self._prefix_blocks.get(request.request_id, 0))
        last = full - self._num_recent
        droppable = sorted(
            (score, position)
            for position, score in rows
            if first <= position < last and self._block(request.request_id, position) is not None
        )
        # Harm: the share of the request's blocks that is gone or scores lower. Comparable between requests.
        harms = ((num_dropped + rank) / full for rank in range(len(droppable)))
        ranked = zip(harms, droppable, strict=False)
        return [(harm, request.request_id, position) for harm, (_, position) in islice(ranked, max(0, allowed))]

    def _merged(self) -> Iterable[tuple[float, str, int]]:
        return heapq.merge(*(track.candidates for track in self._tracks.values() if track.candidates))

    def _block(self, request_id: str, position: int) -> Any:
        """The block at a position if only this request holds it, else None."""
        blocks = self._manager.req_to_blocks.get(request_id, ())
        block = blocks[position] if position < len(blocks) else None
        return None if block is None or block.is_null or block.ref_cnt != 1 else block

    def _leave_prefix_index(self, request_id: str, first: int) -> None:
        later = self._manager.req_to_blocks[request_id][first:]
        self._pool.evict_blocks({block.block_id for block in later if not block.is_null and block.ref_cnt == 1})
        self._manager.num_cached_block[request_id] = _NEVER

    def _full_blocks(self, request: Any) -> int:
        """Full blocks of a request whose prompt is computed, dropped ones included; else 0."""
        computed = request.num_computed_tokens - request.num_output_placeholders
        # After a preemption the answer so far is computed again as well.
        is_computed = computed >= max(request.num_prompt_tokens, request.num_tokens - 1)
        return computed // self._block_tokens if is_computed else 0


def _opted_out(request: Any) -> bool:
    params = request.sampling_params
    arguments = (params.extra_args if params is not None else None) or {}
    return not arguments.get(KV_PRUNING_OPT_OUT, True)


def unsupported(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Say why KV blocks cannot be dropped with this model and engine; None if they can.

    Pure function of what scheduler and worker both have, so that they agree.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1 or type(groups[0].kv_cache_spec).__name__ != "FullAttentionSpec":
        return "the model does not use full attention in all layers"
    spec, model = groups[0].kv_cache_spec, vllm_config.model_config.hf_text_config
    parallel, backend = vllm_config.parallel_config, vllm_config.attention_config.backend
    spread = (parallel.pipeline_parallel_size, parallel.decode_context_parallel_size)
    objections = {
        "the model attends to a window": spec.sliding_window is not None or spec.attention_chunk_size is not None,
        "the model's attention counts distances by place in the cache (ALiBi)": (
            getattr(model, "alibi", False) or model.model_type in _ALIBI_MODELS
        ),
        "draft tokens rewrite blocks": vllm_config.speculative_config is not None,
        "a KV connector sends blocks elsewhere": vllm_config.kv_transfer_config is not None,
        "blocks are spread over several devices": max(*spread, parallel.prefill_context_parallel_size) > 1,
        "batches are split into micro-batches": parallel.use_ubatching,
        "attention runs inside captured graphs; compilation_config.cudagraph_mode must be PIECEWISE or NONE": (
            vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        ),
        f"attention backend {backend and backend.name} may read lengths that are not shortened": (
            backend is not None and backend.name not in _BACKENDS
        ),
    }
    return next((reason for reason, holds in objections.items() if holds), None)
