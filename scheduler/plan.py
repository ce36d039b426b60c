"""What the iteration planner is told and what it answers. Plain data; units are in the names."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

PruneReason = Literal["", "decode", "prefill", "finetune"]
"""What blocks are dropped for; the first of these if there are several."""

MAX_PREFILLS_SEEN = 8
"""More prefills than this never share an iteration's budget in a useful way, and looking costs time."""


@dataclass(slots=True)
class PrefillTask:
    """A request without its first token: in progress, or at the head of the waiting queue."""

    request_id: str
    arrived_s: float
    """On the clock of `IterationView.now_s`."""
    num_tokens: int
    """Prompt tokens that are still to be computed."""
    context_tokens: int = 0
    """Prompt tokens that need not be computed: they were, or the prefix cache has them."""
    user_priority: int = 0
    """The request's `priority` field: lower is sooner, above 0 is class `batch`."""
    is_running: bool = False
    """Has a seat already (a chunk of it was computed)."""
    held_tokens: int = 0
    """Prompt tokens in blocks that are not free: kept for it beyond `context_tokens`, or, while it waits, those of its
    cached ones that somebody holds."""

    @property
    def kept_tokens(self) -> int:
        """Tokens for which it takes no free block."""
        return max(self.context_tokens, self.held_tokens) if self.is_running else self.held_tokens

    @property
    def revived_tokens(self) -> int:
        """Cached tokens in free blocks: its first chunk takes these too."""
        return 0 if self.is_running else max(0, self.context_tokens - self.held_tokens)


@dataclass(frozen=True, slots=True)
class PruneOffer:
    """KV blocks that may be dropped now, the least harmful first."""

    costs: Sequence[float]
    """Relative harm of each block, 0 (attention would not miss it) to 1, ascending."""

    @property
    def num_blocks(self) -> int:
        """How many may be dropped."""
        return len(self.costs)

    def cost_of(self, num_blocks: int) -> float:
        """Summed harm of the `num_blocks` cheapest; of all if that many are not offered."""
        return sum(self.costs[:num_blocks])


@dataclass(slots=True)
class FineTuneState:
    """The fine-tune work inside this engine."""

    last_progress_s: float
    """When a slice last ran, or the oldest task arrived, whichever is later."""
    dpo_loss: float | None = None
    """Of the task in front; None if it was never scored."""
    attempts: int = 0
    gamma: float | None = None
    """Weight of the loss in the priority; None: the configured one."""
    held_bytes: int = 0
    """Arena memory of the step in progress."""
    step_tokens: int = 0
    """Padded tokens of the micro-batches of the step in progress, which keeps them; 0 if there is none."""
    is_training: bool = True
    """False: the task in front only scores pairs; no retrain rate holds it back."""
    max_batch_tokens: int = 0
    """Padded tokens of the largest pair of the task in front: no micro-batch can be smaller. 0 if unknown."""


@dataclass(slots=True)
class IterationView:
    """The engine's state before an iteration is scheduled."""

    now_s: float
    num_decode: int = 0
    """Running requests that will get their next token."""
    decode_tokens: int = 0
    """Tokens that they take; more than `num_decode` with draft tokens. 0: one each."""
    decode_context: int = 0
    """Their tokens in the KV cache, summed."""
    prefills: list[PrefillTask] = field(default_factory=list)
    """In progress first, then the head of the waiting queue in its order; bounded by `MAX_PREFILLS_SEEN`."""
    num_waiting_unseen: int = 0
    """Waiting requests beyond `prefills`."""
    unseen_tokens: int = 0
    """Their prompt tokens (an estimate is good enough)."""
    oldest_unseen_s: float | None = None
    """Earliest arrival among them."""
    free_seats: int = 1 << 30
    """How many waiting requests may still start running."""
    used_kv_bytes: int = 0
    """KV cache that cannot be given out."""
    free_kv_blocks: int = 1 << 30
    """KV blocks that can be given out now, cached ones that nobody holds included."""
    block_tokens: int = 1
    """Tokens of a KV block."""
    decode_blocks: int = 0
    """KV blocks that the decoding requests need in this iteration: those whose next token begins a block."""
    prune_offer: PruneOffer | None = None
    """KV blocks that may be dropped; None: pruning is off, or no block is known to be droppable."""
    finetune: FineTuneState | None = None

    @property
    def num_unlooked(self) -> int:
        """Prefills that there is still room for."""
        return MAX_PREFILLS_SEEN - len(self.prefills)

    def add_running(self, prefill: PrefillTask) -> None:
        """Add a prompt in progress; beyond the bound it is only counted."""
        if self.num_unlooked > 0:
            self.prefills.append(prefill)
        else:
            self._count_unseen(1, prefill.num_tokens, prefill.arrived_s)

    def add_waiting(self, head: Sequence[PrefillTask], num_waiting: int, oldest_s: float | None) -> None:
        """Add the waiting queue: its first `num_unlooked` requests, its length and its earliest arrival.

        Walking a long queue in every iteration would cost more than the answer is worth: the head stands for it.
        """
        self.prefills.extend(head)
        unseen = num_waiting - len(head)
        if unseen and oldest_s is not None:
            mean_tokens = sum(p.num_tokens for p in self.prefills) // max(1, len(self.prefills))
            self._count_unseen(unseen, unseen * mean_tokens, oldest_s)

    def _count_unseen(self, count: int, num_tokens: int, oldest_s: float) -> None:
        self.num_waiting_unseen += count
        self.unseen_tokens += num_tokens
        self.oldest_unseen_s = oldest_s if self.oldest_unseen_s is None else min(oldest_s, self.oldest_unseen_s)


@dataclass(slots=True)
class Plan:
    """One iteration. `token_budget` and `max_chunk_tokens` hold for inference, the rest for fine-tuning."""

    token_budget: int
    """Tokens (decode and prefill) that the forward pass may take; 0 in a blocking training phase."""
    max_chunk_tokens: int
    """Longest prefill chunk of one request; 0: no limit beyond the budget."""
    finetune_budget_s: float = 0.0
    """Slices run while their upper estimate fits into this."""
    min_slices: int = 0
    """Slices that run even if their estimate does not fit."""
    slice_tokens: int = 0
    """Padded tokens that a micro-batch started from now on may have; 0: as configured."""
    prune_blocks: int = 0
    """KV blocks to drop before this iteration is scheduled."""
    prune_reason: PruneReason = ""
    """Who needs them: `decode`, `prefill` or `finetune`."""
    wants_prune_scores: bool = False
    """Memory is getting short: blocks should be scored with this forward pass."""
    reserves_arena: bool = False
    """Memory for the slices' step is reserved in the ledger, until a report says that nothing is held."""
    defers_training: bool = False
    """Memory is short even with all that may be dropped: no slices, unless they have waited too long."""
    is_blocking: bool = False
    """Slices run to the end of the current step without inference (policies `periodic` and `continuous`)."""
    predicted_forward_s: float | None = None
