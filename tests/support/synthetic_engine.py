"""An engine on a synthetic device, in no time: one iteration for each scheduler turn. Requests join as they come."""

import asyncio
from dataclasses import dataclass

from core.batch import ForwardShape, IterationSample
from core.dpo_slices import PairGroup
from core.types import SliceKind, SliceReport, SliceTiming, TaskKind, TaskResult
from tests.support.synthetic_device import SyntheticDevice


@dataclass
class Running:
    num_prompt: int
    cached: int
    max_tokens: int
    num_done: int = 0


class SyntheticEngine:
    def __init__(self, device=None, step_s=0.0):
        self.device = device or SyntheticDevice()
        self.step_s = step_s
        self.requests = {}
        self.samples = []
        self.prompts = []
        self.tasks = []
        self.num_aborted = 0
        self.foreign = 0

    def num_unfinished_requests(self):
        return len(self.requests) + self.foreign

    async def iterations(self, after=0):
        return len(self.samples), self.samples[after:]

    async def decode(self, prompt_ids, request_id, max_tokens, handle=None, priority=0):
        cached = max((common(prompt_ids, other) for other in self.prompts), default=0)
        self.prompts.append(list(prompt_ids))
        request = Running(len(prompt_ids), min(cached, len(prompt_ids) - 1), max_tokens)
        self.requests[request_id] = request
        try:
            while request.num_done < max_tokens:
                await asyncio.sleep(self.step_s)
                self.step(request)
                yield [0] * request.num_done
        except (GeneratorExit, asyncio.CancelledError):
            self.num_aborted += 1
            raise
        finally:
            del self.requests[request_id]

    async def run_task(self, task):
        self.tasks.append(task)
        self.requests[task.task_id] = Running(0, 0, 0)
        try:
            await asyncio.sleep(self.step_s)
            num_tokens = sum(PairGroup((pair.lengths,)).num_tokens for pair in task.pairs)
            kinds = [SliceKind.POLICY_LAYER, SliceKind.POLICY_LAYER]
            if task.kind is TaskKind.TRAIN:
                kinds.append(SliceKind.BACKWARD_LAYER)
            timings = [
                SliceTiming(kind, num_tokens, self.device.exact_slice_s(kind, num_tokens) * self.device.jitter())
                for kind in kinds
            ]
            self.samples.append(IterationSample(ForwardShape(), 0.0, 1e-3, SliceReport(timings)))
            return TaskResult(task.task_id, task.kind, peak_bytes=10_000 + 100 * num_tokens)
        finally:
            del self.requests[task.task_id]

    def step(self, leader):
        """One iteration for all, when the oldest unfinished request asks for it."""
        if leader is not next(iter(self.requests.values())):
            leader.num_done += leader.num_done == 0
            return
        shape = ForwardShape()
        for request in self.requests.values():
            if request.num_done == 0:
                shape.add_chunk(request.num_prompt - request.cached, request.cached)
            else:
                shape.num_decode += 1
                shape.decode_context += request.num_prompt + request.num_done
            request.num_done = min(request.num_done + 1, request.max_tokens)
        self.samples.append(self.device.sample(shape))


def common(a, b):
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
