"""The fine-tune tasks inside one engine, from the scheduler's side: what is waiting and since when."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from core.dpo_slices import PairGroup
from core.types import SliceReport, TaskKind
from scheduler.view import FineTuneState


@dataclass(slots=True)
class EngineTask:
    """A task that vLLM knows as a request."""

    request: Any
    task: dict[str, Any]
    """`FineTuneTask.to_wire()`; the worker names what is wrong with it."""
    max_batch_tokens: int
    """Tokens that a layer computes for its largest pair alone, padding included, before it is cut."""
    arrived_s: float

    @property
    def num_pairs(self) -> int:
        """Pairs of the task."""
        return len(self.task.get("pairs") or ())


class TaskTable:
    """Tasks in order of arrival, which is the order in which the worker runs them. Times are wall clock."""

    def __init__(self, share_prompts: bool = True) -> None:
        self._share_prompts = share_prompts
        self._tasks: dict[str, EngineTask] = {}
        self._last_progress_s = 0.0
        self._report = SliceReport()
        """The newest one."""

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def add(self, request: Any, task: dict[str, Any], now_s: float) -> None:
        """Take in a task given as `FineTuneTask.to_wire()`."""
        largest = _largest_pair(task.get("pairs") or (), self._share_prompts)
        self._tasks[request.request_id] = EngineTask(request, task, largest, now_s)

    def pop(self, task_id: str) -> EngineTask | None:
        """Take out a task that ended; None if it was aborted before."""
        return self._tasks.pop(task_id, None)

    def remove(self, task_ids: Iterable[str] | None) -> list[Any]:
        """Take out aborted tasks (None: all of them); returns their requests."""
        ids = list(self._tasks) if task_ids is None else [i for i in task_ids if i in self._tasks]
        return [self._tasks.pop(i).request for i in ids]

    def note_progress(self, report: SliceReport, now_s: float) -> None:
        """Remember when slices last ran and what their step holds."""
        if report.slices:
            self._last_progress_s = now_s
        self._report = report

    def state(self, now_s: float) -> FineTuneState | None:
        """The fine-tune work as the planner sees it; None if there is no task."""
        if not self._tasks:
            return None
        front = next(iter(self._tasks.values()))
        # A wall clock that was set back must not stop ageing until it has caught up.
        front.arrived_s = min(front.arrived_s, now_s)
        self._last_progress_s = min(self._last_progress_s, now_s)
        return FineTuneState(
            last_progress_s=max(front.arrived_s, self._last_progress_s),
            is_training=front.task.get("kind") != TaskKind.EVALUATE,
            dpo_loss=front.task.get("dpo_loss"),
            attempts=front.task.get("attempts", 0),
            gamma=front.task.get("gamma"),
            activation_bytes=self._report.activation_bytes,
            step_tokens=self._report.step_tokens,
            max_batch_tokens=front.max_batch_tokens,
        )


def _largest_pair(pairs: Iterable[dict[str, Any]], share_prompts: bool) -> int:
    """Tokens of the largest pair in the layout that the step will choose; 0 for malformed pairs, which it will name."""
    try:
        lengths = [(len(p["prompt_ids"]), len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    except (KeyError, TypeError):
        return 0
    return max((PairGroup((three,), may_share=share_prompts).num_tokens for three in lengths), default=0)
