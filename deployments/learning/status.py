"""What an executor's learner is doing and has done: counters for `/v1/training`. Reset by a restart."""

import time
from dataclasses import dataclass, field

from core.types import StepMetrics

_SMOOTHING = 0.2


@dataclass(slots=True)
class LearnerStatus:
    """What `/v1/training` shows of this executor."""

    phase: str = "idle"
    """idle, scoring, training, evaluating, publishing, backing off, pinned or paused."""
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
    restored_steps: int = 0
    """`total_steps` of the checkpoint that this process started from."""
    started_at: float = field(default_factory=time.time)

    def note_step(self, metrics: StepMetrics, num_pairs: int, wall_s: float) -> None:
        """Count an optimizer step; `wall_s` is from the batch's arrival to its end."""
        self.steps += 1
        self.pairs += num_pairs
        self.last = metrics
        rate = num_pairs / max(wall_s, 1e-9)
        smoothed = self.pairs_per_s + _SMOOTHING * (rate - self.pairs_per_s)
        self.pairs_per_s = smoothed if self.pairs_per_s else rate
