"""What the measurements need of an engine."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from core.batch import IterationSample
from core.types import FineTuneTask, TaskResult


class MeasuredEngine(Protocol):
    """`engine.vllm.engine.HybridEngine` is the real one."""

    def decode(
        self, prompt_ids: Sequence[int], request_id: str, max_tokens: int, handle: Any = None, priority: int = 0
    ) -> AsyncIterator[list[int]]:
        """Token ids so far, after each output; always `max_tokens` in the end."""
        ...

    async def run_task(self, task: FineTuneTask) -> TaskResult:
        """Run a fine-tune task to its end; cancelling aborts it."""
        ...

    async def iterations(self, after: int) -> tuple[int, list[IterationSample]]:
        """The newest sequence number, and the samples after `after` that are still known."""
        ...
