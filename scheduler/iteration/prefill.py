"""The prompt chunks of an iteration: Algorithm 1 on the prompts in their order, nobody overtakes.

A chunk comes in candidate sizes; those that need KV blocks which are not free carry what pruning for them costs
(`scheduler.packing`). A prompt in progress is never given a chunk for which there are no blocks: vLLM would preempt a
request for it. One that has not started is admitted by vLLM only when the free blocks hold the whole of it
(`scheduler_reserve_full_isl`), so that is what is asked for; if that is not to be had, vLLM decides.
"""

from dataclasses import dataclass

from core.batch import ForwardShape
from core.config import ExperimentsConfig
from core.ports import LatencyPredictor
from scheduler.memory.relief import FREE, BlockBudget, Quote
from scheduler.packing import Bin, Demand, choose_candidate
from scheduler.view import IterationView, PrefillTask

MIN_PREFILL_TOKENS = 32
"""Prefill tokens that an iteration takes even if the running requests leave no time for them."""
_CHUNK_MULTIPLE = 16
"""Chunks that do not end a prompt are multiples of this: kernels and KV blocks like it."""


@dataclass(slots=True)
class _Candidate:
    """One size of a chunk."""

    num_tokens: int
    demand: Demand
    num_blocks: int
    """KV blocks that must be free when it is scheduled."""
    quote: Quote


class PrefillPacker:
    """Chunks for one bin, the iteration that is about to be scheduled."""

    def __init__(
        self,
        experiments: ExperimentsConfig,
        predictor: LatencyPredictor,
        *,
        max_tokens: int,
        kv_bytes_per_token: float,
    ) -> None:
        self._experiments = experiments
        self._predictor = predictor
        self._max_tokens = max_tokens
        self._kv_bytes_per_token = kv_bytes_per_token

    def pack(self, view: IterationView, shape: ForwardShape, now: Bin, blocks: BlockBudget) -> list[int]:
        """Chunk sizes of the prefills seen, in their order; added to `shape`, `now` and `blocks`."""
        seats = view.free_seats
        chunks: list[int] = []
        for prefill in view.prefills:
            if not prefill.is_running:
                if seats <= 0:
                    break
                seats -= 1
            tokens = self._pack_chunk(prefill, shape, now, blocks)
            if tokens == 0:
                break
            chunks.append(tokens)
            if tokens < prefill.num_tokens:
                break
        if chunks or not view.prefills:
            return chunks
        return self._least_chunk(view, blocks)

    def _least_chunk(self, view: IterationView, blocks: BlockBudget) -> list[int]:
        """Decoding alone may fill the iteration, or the joint budget: prompts go on nevertheless, slowly."""
        first = view.prefills[0]
        least = min(MIN_PREFILL_TOKENS, first.num_tokens)
        if not first.is_running:
            if view.free_seats > 0:
                blocks.take_for_chunk(first, least, blocks.blocks_of_chunk(first, first.num_tokens))
            return [least]
        room = min(least, blocks.room_tokens(first, can_prune=True))
        if room <= 0 and view.num_decode:
            blocks.is_short = True  # it waits for those that decode: going on would cost one of them its seat
            return []
        blocks.take_for_chunk(first, max(0, room), blocks.blocks_of_chunk(first, room))
        return [room or least]

    def _pack_chunk(self, prefill: PrefillTask, shape: ForwardShape, now: Bin, blocks: BlockBudget) -> int:
        """Choose how much of the prompt this iteration takes. 0: none fits."""
        base_s = self._predictor.forward_upper_s(shape) or 0.0
        whole, unpruned = self._bounds(prefill, shape, now, blocks)
        if whole <= 0:
            return 0
        whole_demand = self._chunk_demand(whole, prefill, shape, base_s)
        candidates: list[_Candidate] = []
        for size in self._chunk_sizes(whole, unpruned, whole_demand.latency_s, now):
            demand = whole_demand if size == whole else self._chunk_demand(size, prefill, shape, base_s)
            needed = blocks.blocks_of_chunk(prefill, size if prefill.is_running else prefill.num_tokens)
            missing_bytes = now.memory_used_bytes + demand.memory_bytes - now.memory_capacity_bytes
            quote = FREE
            if needed > blocks.free_blocks or missing_bytes > 0:
                quote = blocks.quote(needed, missing_bytes) or FREE
                demand = Demand(demand.memory_bytes, demand.latency_s, quote.pruned_bytes, quote.harm)
            candidates.append(_Candidate(size, demand, needed, quote))
            if quote is FREE and now.fits(demand):
                break  # sizes fall: what follows leaves more room
        chosen = choose_candidate([candidate.demand for candidate in candidates], now, self._experiments)
        if chosen is None:
            return 0
        candidate = candidates[chosen]
        now.add(candidate.demand)
        shape.add_chunk(candidate.num_tokens, prefill.context_tokens)
        blocks.take_for_chunk(prefill, candidate.num_tokens, candidate.num_blocks, candidate.quote)
        return candidate.num_tokens

    def _chunk_sizes(self, whole: int, unpruned: int, whole_s: float, now: Bin) -> list[int]:
        """Candidates, largest first.

        The whole prompt, or what the time left is predicted to hold and half of that; and, if blocks would have to be
        dropped for these, what the free ones hold.
        """
        least = min(MIN_PREFILL_TOKENS, whole)
        if self._experiments.packing == "first_fit":
            return [whole, least]
        left_s = now.latency_capacity_s - now.latency_used_s
        if whole_s <= left_s or whole_s <= 0:
            return [whole] if unpruned >= whole or unpruned < least else [whole, unpruned]
        # Latency is convex in the chunk, so a proportional share always fits; it is at most a little small.
        share = int(whole * max(0.0, left_s) / whole_s) // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE
        half = share // (2 * _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE
        sizes = {whole, share, half, unpruned} if unpruned < share else {whole, share, half}
        return [size for size in sorted(sizes, reverse=True) if size >= least]

    def _bounds(self, prefill: PrefillTask, shape: ForwardShape, now: Bin, blocks: BlockBudget) -> tuple[int, int]:
        """Longest chunk with everything dropped that may be, and without dropping anything."""
        whole = unpruned = min(prefill.num_tokens, self._max_tokens - shape.num_tokens)
        if self._kv_bytes_per_token:
            room = int((now.memory_capacity_bytes - now.memory_used_bytes) / self._kv_bytes_per_token)
            room -= prefill.revived_tokens
            if room < whole:
                least, droppable = MIN_PREFILL_TOKENS, blocks.droppable_blocks * blocks.block_tokens
                whole, unpruned = min(whole, max(least, room + droppable)), min(whole, max(least, room))
        if prefill.is_running:
            whole = min(whole, blocks.room_tokens(prefill, can_prune=True))
            unpruned = min(unpruned, blocks.room_tokens(prefill, can_prune=False))
        if unpruned < whole:
            unpruned = unpruned // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE
        return whole, unpruned

    def _chunk_demand(self, size: int, prefill: PrefillTask, shape: ForwardShape, base_s: float) -> Demand:
        upper_s = self._predictor.forward_upper_s(shape.with_chunk(size, prefill.context_tokens))
        latency_s = (upper_s or 0.0) - base_s
        return Demand((size + prefill.revived_tokens) * self._kv_bytes_per_token, latency_s)
