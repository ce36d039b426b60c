"""Shared nouns that travel between the scheduler, the engine and the deployments.

Plain dataclasses of built-in types only, so that they cross process borders as JSON or msgpack
(`to_wire` / `from_wire`) and the pure packages need no torch.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter


class SliceKind(StrEnum):
    """One uninterruptible piece of a DPO step. The longest slice bounds how long inference can wait."""

    EMBED = "embed"
    REFERENCE_LAYER = "reference_layer"
    REFERENCE_HEAD = "reference_head"
    POLICY_LAYER = "policy_layer"
    POLICY_HEAD = "policy_head"
    LOSS = "loss"
    BACKWARD_LAYER = "backward_layer"
    OPTIMIZER = "optimizer"


class TaskKind(StrEnum):
    """Purpose of a fine-tune task."""

    TRAIN = "train"
    """One optimizer step on a batch of pairs, applied to the shadow adapter."""
    EVALUATE = "evaluate"
    """Score pairs with the shadow adapter against the reference; changes nothing."""


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One preference pair as token ids. `prompt_ids` is shared by both completions."""

    pair_id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    weight: float = 1.0
    """Factor of the pair's loss; the mean is over the number of pairs, so doubtful batches make small steps."""
    reference: tuple[float, float] | None = None
    """Log-probabilities of chosen and rejected under the frozen reference (nats), if they are known already."""

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens of prompt, chosen and rejected completion."""
        return len(self.prompt_ids), len(self.chosen_ids), len(self.rejected_ids)


@dataclass(frozen=True, slots=True)
class PairScore:
    """Sequence-level scores of one pair: sums of token log-probabilities over the completion (nats)."""

    pair_id: str
    policy_chosen_logp: float
    policy_rejected_logp: float
    reference_chosen_logp: float
    reference_rejected_logp: float
    loss: float
    margin: float
    """Implicit reward margin: beta * ((pi_c - ref_c) - (pi_r - ref_r))."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Means over the pairs of one task."""

    loss: float
    margin: float
    accuracy: float
    """Share of pairs whose margin is above zero."""
    grad_norm: float | None = None
    """Before clipping; None for an evaluation."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """File for the training state after a step, with what its learner must know to go on from there."""

    path: str
    progress: dict[str, Any]
    """JSON values; the worker writes them into the file's header and does not look at them."""


@dataclass(frozen=True, slots=True)
class FineTuneTask:
    """A unit of fine-tune work for one engine: a DPO step or an evaluation."""

    task_id: str
    kind: TaskKind
    pairs: tuple[TokenizedPair, ...]
    on_live: bool = False
    """Evaluate the live adapter instead of the shadow; not allowed for training."""
    dpo_loss: float | None = None
    """Mean loss of the pairs when they were scored last, for the priority; None if they never were."""
    attempts: int = 0
    """Failed tries before this one; each lowers the loss's part in the priority."""
    gamma: float | None = None
    """Weight of the loss in the priority; None: `scheduler.gamma`."""
    checkpoint: Checkpoint | None = None
    """Write the training state after the step; only for training."""

    def to_wire(self) -> dict[str, Any]:
        """Built-in types only."""
        wire: dict[str, Any] = _TASK.dump_python(self)
        return wire

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> "FineTuneTask":
        """Inverse of `to_wire`, for sequences that became lists on the way too; ValueError if it is no task."""
        return _TASK.validate_python(data)


@dataclass(slots=True)
class TaskResult:
    """End of a fine-tune task. Exactly one of `metrics` and `error` is set; neither while it runs."""

    task_id: str
    kind: TaskKind
    metrics: StepMetrics | None = None
    scores: tuple[PairScore, ...] = ()
    error: str | None = None
    """Name of the error class of core.errors, then a colon and the message."""
    num_slices: int = 0
    busy_s: float = 0.0
    """Device time of all slices."""
    longest_slice_s: float = 0.0
    peak_bytes: int = 0
    """Most memory between two slices of the step: activations and gradients."""
    free_bytes: int | None = None
    """Free device memory for training when the task ended; None: nobody looked."""
    optimizer_steps: int = 0
    """Steps applied to the shadow adapter since it was last reset, this one included."""
    checkpoint_error: str | None = None
    """Reason why a checkpoint since the last result could not be written; training and serving went on."""

    def to_wire(self) -> dict[str, Any]:
        """Built-in types only."""
        wire: dict[str, Any] = _RESULT.dump_python(self)
        return wire

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> "TaskResult":
        """Inverse of `to_wire`."""
        return _RESULT.validate_python(data)


_TASK = TypeAdapter(FineTuneTask)
_RESULT = TypeAdapter(TaskResult)


@dataclass(slots=True)
class SliceTiming:
    """Measured time of one executed slice."""

    kind: SliceKind
    num_tokens: int
    latency_s: float


@dataclass(slots=True)
class SliceReport:
    """Fine-tuning in one engine iteration, as the worker reports it."""

    slices: list[SliceTiming] = field(default_factory=list)
    finished: list[TaskResult] = field(default_factory=list)
    activation_bytes: int = 0
    """Activations and gradients of the step in progress, after the iteration."""
    step_tokens: int = 0
    """Padded tokens of its micro-batches; 0 without a step."""
    peak_bytes: int = 0
    """Most of them between two slices of this iteration."""
    out_of_memory: bool = False
    """A slice ran out of device memory; its step starts again with smaller ones, or has failed."""
