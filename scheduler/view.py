"""The engine's state as the iteration planner is told it; its answer is `core.batch.Plan`. Units are in the names.

`decode_context` is what attention reads: whoever builds the view leaves out the tokens of dropped KV blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """The request's `priority` field: lower is sooner, above 0 is class `background`."""
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
        """Number of blocks on offer."""
        return len(self.costs)


@dataclass(slots=True)
class FineTuneState:
    """The fine-tune work inside this engine."""

    last_progress_s: float
    """Time at which a slice last ran, or the oldest task arrived, whichever is later."""
    dpo_loss: float | None = None
    """Loss of the task in front; None if it was never scored."""
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
    """Tokens of KV cache that they attend to, summed."""
    prefills: list[PrefillTask] = field(default_factory=list)
    """Prompts in progress, then the head of the waiting queue in its order; bounded by `MAX_PREFILLS_SEEN`."""
    num_waiting_unseen: int = 0
    """Waiting requests beyond `prefills`."""
    unseen_tokens: int = 0
    """Prompt tokens of these (an estimate is good enough)."""
    oldest_unseen_s: float | None = None
    """Earliest arrival among them."""
    free_seats: int = 1 << 30
    """Waiting requests that may still start running."""
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
