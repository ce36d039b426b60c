"""What the iteration planner is told and what it answers. Plain data; units are in the names."""

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
    """Prompt tokens that are in the KV cache already."""
    user_priority: int = 0
    """The request's `priority` field: lower is sooner, above 0 is class `batch`."""
    is_running: bool = False
    """Has a seat already (a chunk of it was computed)."""


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
    is_blocking: bool = False
    """Slices run to the end of the current step without inference (policies `periodic` and `continuous`)."""
    predicted_forward_s: float | None = None
