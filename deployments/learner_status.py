"""What an executor's learner is doing and has done: counters for `/v1/training`. Reset by a restart."""

import math
import time
from dataclasses import dataclass, field

from alignment.gate import GateDecision
from core.types import StepMetrics


@dataclass(slots=True)
class LearnerStatus:
    """What `/v1/training` shows of this executor."""

    phase: str = "idle"
    """idle, training, evaluating, publishing or paused."""
    paused: bool = False
    pause_reason: str | None = None
    steps: int = 0
    failed_steps: int = 0
    pairs: int = 0
    busy_s: float = 0.0
    longest_slice_s: float = 0.0
    last: StepMetrics | None = None
    last_error: str | None = None
    last_decision: str | None = None
    pairs_per_s: float = 0.0
    """Smoothed over the last steps, from batch to batch while training."""
    task_id: str | None = None
    steps_since_candidate: int = 0
    started_at: float = field(default_factory=time.time)

    def candidate_metrics(self, decision: GateDecision) -> dict[str, float | None]:
        """What the manifest of a candidate tells: the gate's numbers and those of the last step; finite ones only."""
        metrics = {name: value for name, value in decision.to_wire().items() if isinstance(value, int | float)}
        metrics.pop("accepted")
        if self.last is not None:
            metrics |= {"train_loss": self.last.loss, "train_margin": self.last.margin}
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
