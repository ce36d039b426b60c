"""The measures when memory is short, in this order: smaller slices, prune, defer training, let vLLM preempt.

With `kv_pruning.start: always` whatever may be dropped is dropped before anything else is decided.

One `BlockBudget` is opened for each iteration. It knows the KV blocks that are free and those that the pruner offers,
and gives them out in order of need: first to the decoding requests, whose next token would otherwise cost somebody
its seat; then to prompts, as the packer weighs it (`scheduler.packing`); then to fine-tuning, if the joint limit
`tau_mem` and not the arena itself is what it lacks. Who gets nothing waits: training before requests, and vLLM
preempts only when blocks are short with everything dropped that may be.

Pure: engine and simulator drop the blocks (`Plan.prune_blocks`), and enforce `max_fraction` by what they offer.
"""

import math
from dataclasses import dataclass, replace

from core.batch import Plan, PruneReason
from core.config import KvPruningConfig
from scheduler.memory.ledger import MemoryLedger, Pool
from scheduler.view import IterationView, PrefillTask, PruneOffer

_SHORT_SHARE = 0.1
_ENOUGH_SHARE = 0.2
"""Shares of the KV blocks, and of the joint budget while there is training: below the first, blocks are scored until
the second is free. Scores come one iteration after they are asked for; a prompt may take a tenth of the blocks in it.
"""

_NOTHING = PruneOffer(())


@dataclass(slots=True)
class Quote:
    """The blocks that have to be dropped for a task to get its memory."""

    num_blocks: int
    pruned_bytes: float
    harm: float
    """Mean over the blocks, 0 to 1; 0 if there are none."""


FREE = Quote(0, 0.0, 0.0)
"""Nothing has to be dropped."""


class BlockBudget:
    """One iteration's KV blocks: free, droppable and given out."""

    def __init__(self, view: IterationView, block_bytes: float) -> None:
        self.block_bytes = block_bytes
        self.block_tokens = view.block_tokens
        self.free_blocks = view.free_kv_blocks
        """Not promised to anybody, those that are going to be dropped included."""
        self.decode_blocks = 0
        """Given to decoding requests."""
        self.chunk_tokens = 0
        """Prompt tokens that this iteration computes, or takes from free blocks; more may be promised."""
        self.pruned_blocks = 0
        self.reason: PruneReason = ""
        self.is_short = False
        """Running requests lack blocks with everything dropped that is offered."""
        self._offer = view.prune_offer or _NOTHING

    @property
    def growth_bytes(self) -> float:
        """Growth of the KV blocks in use with this iteration; negative if more are dropped."""
        chunk_blocks = self.chunk_tokens / self.block_tokens if self.chunk_tokens else 0.0
        return (self.decode_blocks + chunk_blocks - self.pruned_blocks) * self.block_bytes

    @property
    def droppable_blocks(self) -> int:
        """Offered and not taken yet."""
        return self._offer.num_blocks - self.pruned_blocks

    def blocks_of_chunk(self, prefill: PrefillTask, num_tokens: int) -> int:
        """New blocks of the next `num_tokens` of a prompt."""
        size = self.block_tokens
        held = -(-prefill.kept_tokens // size)
        return max(0, -(-(prefill.context_tokens + num_tokens) // size) - held)

    def room_tokens(self, prefill: PrefillTask, *, can_prune: bool) -> int:
        """The longest chunk that there are blocks for, or would be with all dropped that may be."""
        held = -(-prefill.kept_tokens // self.block_tokens)
        blocks = held + self.free_blocks + (self.droppable_blocks if can_prune else 0)
        return blocks * self.block_tokens - prefill.context_tokens

    def quote(self, num_blocks: int = 0, missing_bytes: float = 0.0) -> Quote | None:
        """The price of so many new blocks, and of bytes of the joint budget; None if that is not on offer."""
        missing = num_blocks - self.free_blocks
        if missing_bytes > 0:
            missing = max(missing, math.ceil(missing_bytes / self.block_bytes) if self.block_bytes else 1 << 60)
        if missing <= 0:
            return FREE
        if missing > self.droppable_blocks:
            return None
        cost = sum(self._offer.costs[self.pruned_blocks : self.pruned_blocks + missing])
        return Quote(missing, missing * self.block_bytes, min(1.0, max(0.0, cost / missing)))

    def take(self, num_blocks: int, quote: Quote, reason: PruneReason) -> None:
        """Give out blocks, after dropping what was quoted for them."""
        self.pruned_blocks += quote.num_blocks
        self.free_blocks = max(0, self.free_blocks + quote.num_blocks - num_blocks)
        if quote.num_blocks and not self.reason:
            self.reason = reason

    def take_for_chunk(
        self, prefill: PrefillTask, num_tokens: int, num_blocks: int, quote: Quote | None = None
    ) -> None:
        """Blocks promised to a prompt of which `num_tokens` are computed now; quoted here if they are not yet."""
        if quote is None:
            quote = self.quote(num_blocks) or FREE
        self.take(num_blocks, quote, "prefill")
        self.chunk_tokens += num_tokens + prefill.revived_tokens

    def take_for_decode(self, num_blocks: int) -> None:
        """Blocks of the decoding requests, as far as there are any; what is missing then vLLM gets by preempting."""
        quote = self.quote(num_blocks)
        if quote is None:
            self.is_short = True
            num_blocks = self.free_blocks + self.droppable_blocks
            quote = self.quote(num_blocks) or FREE
        self.decode_blocks = num_blocks
        self.take(num_blocks, quote, "decode")


class MemoryRelief:
    """Opens and closes the budgets; knows when memory was short last."""

    def __init__(self, pruning: KvPruningConfig | None, memory: MemoryLedger, kv_bytes_per_token: float) -> None:
        self._start = "off" if pruning is None else pruning.start
        self._memory = memory
        self._kv_bytes_per_token = kv_bytes_per_token
        self._is_short = False

    def drop_at_once(self, view: IterationView) -> tuple[IterationView, int]:
        """The view without the blocks on offer, and their number, for `start: always`; else the view as it is."""
        if self._start != "always" or view.prune_offer is None:
            return view, 0
        dropped = view.prune_offer.num_blocks
        tokens = dropped * view.block_tokens
        rest = replace(
            view,
            # An offer may hold requests that are not decoded now.
            decode_context=max(0, view.decode_context - tokens),
            used_kv_bytes=view.used_kv_bytes - round(tokens * self._kv_bytes_per_token),
            free_kv_blocks=view.free_kv_blocks + dropped,
            prune_offer=None,
        )
        return rest, dropped

    def open(self, view: IterationView) -> BlockBudget:
        """The iteration's blocks; what decoding needs is given out already."""
        blocks = BlockBudget(view, view.block_tokens * self._kv_bytes_per_token)
        blocks.take_for_decode(view.decode_blocks)
        return blocks

    def close(self, blocks: BlockBudget, view: IterationView, plan: Plan) -> None:
        """Write the decision into the plan, and the KV memory after it into the ledger."""
        plan.wants_prune_scores = self._wants_scores(blocks, view)
        plan.defers_training = blocks.is_short
        if blocks.pruned_blocks:
            plan.prune_blocks, plan.prune_reason = blocks.pruned_blocks, blocks.reason
        # What is given out now is not free for slices; a step that fits today must fit when it is.
        used_bytes = min(view.used_kv_bytes + int(blocks.growth_bytes), self._memory.pool_capacity_bytes(Pool.KV))
        self._memory.record(Pool.KV, max(0, used_bytes))

    def _wants_scores(self, blocks: BlockBudget, view: IterationView) -> bool:
        if self._start != "memory_pressure":
            return self._start == "always"
        share = _ENOUGH_SHARE if self._is_short else _SHORT_SHARE
        self._is_short = self._lacks(share, blocks, view)
        return self._is_short

    def _lacks(self, share: float, blocks: BlockBudget, view: IterationView) -> bool:
        """True if less than `share` is free, or less than the first prompt in line needs."""
        block_bytes = max(blocks.block_bytes, 1e-9)
        kv_blocks = self._memory.pool_capacity_bytes(Pool.KV) / block_bytes
        if blocks.free_blocks < share * kv_blocks:
            return True
        if view.prefills:
            first = view.prefills[0]
            if blocks.blocks_of_chunk(first, first.num_tokens) > blocks.free_blocks:
                return True
        capacity = self._memory.capacity_bytes
        return view.finetune is not None and capacity - self._memory.used_bytes < share * capacity
