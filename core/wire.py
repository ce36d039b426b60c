"""Messages that cross a Ray handle: built-in types in frozen dataclasses, cheap to pickle."""

from dataclasses import dataclass, field
from typing import Any, Literal

from core.types import PairScore, TaskKind

Prompt = str | list[dict[str, Any]]
"""Plain text for completions, chat messages otherwise."""


PairRole = Literal["new", "hard", "replay"]
"""Reason for training a pair: never trained before, still wrong under the live adapter, or to keep what was learnt."""
ROLE_SHARES: dict[str, float] = {"new": 0.5, "hard": 0.25, "replay": 0.25}
"""Shares of a batch; what one role cannot fill, the others may."""


@dataclass(frozen=True, slots=True)
class CachedReference:
    """Log-probabilities of a pair under the frozen reference model (nats), computed once."""

    key: str
    """Hash of base model and token ids; worthless for an executor that computes another key for the pair."""
    chosen_logp: float
    rejected_logp: float


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """A preference pair on its way from the store to an executor."""

    pair_id: str
    prompt: Prompt
    chosen: str
    rejected: str
    dpo_loss: float | None = None
    """Loss when it was scored last; None if it never was."""
    times_trained: int = 0
    weight: float = 1.0
    """The user's weight times what the quality checks left of it."""
    reference: CachedReference | None = None
    role: PairRole = "new"
    tools: list[dict[str, Any]] | None = None
    """The tools that the prompt is rendered with."""
    chosen_calls: list[dict[str, Any]] | None = None
    """The tool calls that are part of the answer; its text may then be empty."""
    rejected_calls: list[dict[str, Any]] | None = None
    chosen_ids: tuple[int, ...] | None = None
    """The token ids that the model emitted as this answer, if they are known."""
    rejected_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class HeldOutPairs:
    """Test set of the publish gate: pairs that are never trained on."""

    recent: tuple[TrainingPair, ...] = ()
    """The newest, one for each prompt."""
    old: tuple[TrainingPair, ...] = ()
    """A sample of those before, back to the last change of preferences."""


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Learning anew from the base model, from all stored feedback: what of it, and how far that is."""

    without_users: tuple[str, ...] = ()
    num_pairs: int = 0
    """Of the first pass, which trains every pair; later ones train what is not learnt yet."""
    until_seq: int = 0
    """Position of the last pair; what comes later is learnt afterwards, as always."""
    since_seq: int = 0
    """Position of the last change of preferences: later passes begin behind it."""
    after_seq: int = 0
    """Position of the last pair that was taken in this pass."""
    passes: int = 0
    """Whole passes so far."""
    num_taken: int = 0
    """Pairs taken in this pass."""


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One DPO step's worth of pairs, or pairs to score, leased to one executor."""

    task_id: str
    pairs: tuple[TrainingPair, ...]
    attempts: int = 0
    """Failed tries of its pairs so far."""
    kind: TaskKind = TaskKind.TRAIN
    """EVALUATE: score them with the live adapter."""
    gamma: float | None = None
    """Weight of the loss in the priority now; None: `scheduler.gamma`."""

    @property
    def dpo_loss(self) -> float | None:
        """Mean loss of those pairs that were ever scored; None if none was."""
        losses = [pair.dpo_loss for pair in self.pairs if pair.dpo_loss is not None]
        return sum(losses) / len(losses) if losses else None


@dataclass(frozen=True, slots=True)
class ExecutorLoad:
    """Resources of an executor for inference; its bin when a request is placed (`scheduler.placement`)."""

    executor_id: str
    reported_s: float
    """Time of the measurement on the wall clock (`time.time`), so that other machines can judge its age."""
    free_kv_bytes: float
    kv_capacity_bytes: float
    kv_bytes_per_token: float
    ttft_target_s: float
    waiting_tokens: int = 0
    """Prompt tokens still to compute of requests without a first token."""
    num_running: int = 0
    """Requests that are past their first token."""
    prompt_token_s: float | None = None
    """Measured seconds that one more prompt token takes; None before any prompt was measured."""
    wait_s: float = 0.0
    """Seconds a prompt waits whatever its length: for the iteration in progress, and its own fixed part."""


@dataclass(frozen=True, slots=True)
class Headroom:
    """Resources of an executor for fine-tuning; its bin in the best-fit packing."""

    executor_id: str
    memory_bytes: float
    latency_s: float
    """Device seconds that inference is expected to leave free within the next `HORIZON_S`."""
    load: ExecutorLoad | None = None
    """Its state as request routers see it; None until it was measured."""
    refusal: str = ""
    """The reason for which it takes pairs to score, and none to train; empty: it trains."""


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """Result of a leased batch on its executor."""

    task_id: str
    executor_id: str
    scores: tuple[PairScore, ...] = ()
    error: str | None = None
    busy_s: float = 0.0
    peak_bytes: int = 0
    unusable: tuple[tuple[str, str], ...] = ()
    """Pairs left out, with the reason (too long for the model, say); they are parked, not retried."""
    kind: TaskKind = TaskKind.TRAIN
    fingerprint: str = ""
    """The executor's base model; an outcome of another one than the store's is not recorded. Empty: not said."""
    reference_keys: dict[str, str] = field(default_factory=dict)
    """The `CachedReference.key` of the reference log-probabilities in `scores`, by pair id."""


HORIZON_S = 10.0
"""Window over which executors report their free device time."""
