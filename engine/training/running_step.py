"""The fine-tune step in progress in a worker, and what it has cost so far."""

import logging

from core.types import FineTuneTask, TaskResult
from engine.training.dpo import DpoStep
from engine.training.dpo_work import SliceSpec

logger = logging.getLogger(__name__)


class RunningStep:
    """The step in progress and what it has cost so far."""

    __slots__ = ("busy_s", "longest_slice_s", "num_slices", "peak_bytes", "slice_tokens", "step", "task")

    def __init__(self, task: FineTuneTask, step: DpoStep, slice_tokens: int) -> None:
        self.task = task
        self.step = step
        self.slice_tokens = slice_tokens
        self.num_slices = 0
        self.busy_s = 0.0
        self.longest_slice_s = 0.0
        self.peak_bytes = 0

    def next_spec(self) -> SliceSpec:
        """The slice to run now; a step that is done was finished before."""
        spec = self.step.next_slice
        assert spec is not None
        return spec

    @property
    def largest_batch_pairs(self) -> int:
        """Most pairs that go together through a slice; the work of a discarded step is forgotten, so ask the task."""
        return self.step.largest_batch_pairs

    def count(self, latency_s: float, held_bytes: int) -> None:
        """Add one slice and the memory that is held after it."""
        self.num_slices += 1
        self.busy_s += latency_s
        self.longest_slice_s = max(self.longest_slice_s, latency_s)
        self.peak_bytes = max(self.peak_bytes, held_bytes)


def failure(task: FineTuneTask, error: Exception) -> TaskResult:
    """The result of a task that did not end well; logged here."""
    logger.warning("fine-tune task %s failed: %s", task.task_id, error, exc_info=error)
    return TaskResult(task.task_id, task.kind, error=f"{type(error).__name__}: {error}")
