"""An engine with known delays, behind the `MeasuredEngine` protocol."""

import asyncio

from core.batch import ForwardShape, IterationSample
from core.types import SliceKind, SliceReport, SliceTiming, StepMetrics, TaskResult


class FakeEngine:
    """Every request takes `first_s` to its first token and `gap_s` between outputs of `tokens_per_output`."""

    def __init__(self, *, first_s=0.02, gap_s=0.01, tokens_per_output=1, step_s=0.03, slots=1000, steps_after=0):
        self.first_s, self.gap_s, self.step_s = first_s, gap_s, step_s
        self.tokens_per_output = tokens_per_output
        self.steps_after = steps_after
        """Requests that must have come before a step is run, as with policies that block to train."""
        self.may_train = asyncio.Event()
        if not steps_after:
            self.may_train.set()
        self.slots = asyncio.Semaphore(slots)
        self.fail_request = lambda request_id: None
        self.step_error = None
        self.seen = []
        self.running_steps = self.most_running_steps = 0
        self.aborted_steps = 0
        self.samples = []
        self.kept = 10_000

    async def decode(self, prompt_ids, request_id, max_tokens, handle=None, priority=0):
        self.seen.append((request_id, asyncio.get_running_loop().time(), list(prompt_ids), priority))
        if len(self.seen) >= self.steps_after:
            self.may_train.set()
        async with self.slots:
            await asyncio.sleep(self.first_s)
            ids = [1]
            yield list(ids)
            while len(ids) < max_tokens:
                error = self.fail_request(request_id)
                if error == "cut":
                    return
                if error is not None:
                    raise error
                await asyncio.sleep(self.gap_s)
                ids.extend([1] * min(self.tokens_per_output, max_tokens - len(ids)))
                yield list(ids)

    async def run_task(self, task):
        self.running_steps += 1
        self.most_running_steps = max(self.most_running_steps, self.running_steps)
        try:
            await self.may_train.wait()
            await asyncio.sleep(self.step_s)
        except asyncio.CancelledError:
            self.aborted_steps += 1
            raise
        finally:
            self.running_steps -= 1
        timing = SliceTiming(SliceKind.BACKWARD_LAYER, 32, self.step_s / 2)
        self.samples.append(IterationSample(ForwardShape(), 0.0, report=SliceReport([timing, timing])))
        if self.step_error is not None:
            return TaskResult(task.task_id, task.kind, error=self.step_error)
        metrics = StepMetrics(0.6, 0.1, 1.0)
        return TaskResult(task.task_id, task.kind, metrics=metrics, busy_s=self.step_s, longest_slice_s=0.01)

    async def iterations(self, after):
        held = self.samples[-self.kept :] if self.kept else []
        first = len(self.samples) - len(held)
        return len(self.samples), held[max(0, after - first) :]
