"""vLLM's scheduler plus fine-tune work: each `SchedulerOutput` carries a `Directive` for the worker.

Inference scheduling is vLLM's own, unchanged. A request whose `extra_args` hold `TASK_KEY` is a fine-tune task:
it is taken aside before vLLM queues it, keeps the engine stepping while it is unfinished, and ends as an
`EngineCoreOutput` whose `kv_transfer_params` carry the `TaskResult`. What an iteration may spend on it is
decided by `scheduler.iteration`; the slices run in `engine.hybrid_worker`.

Invariant: nothing in here may raise because of a fine-tune task; an exception would end the engine.
"""

import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from core.config import AppArgs
from core.types import TaskResult
from engine.messages import DIRECTIVE_ATTRIBUTE, REPORT_ATTRIBUTE, TASK_KEY, Directive, IterationReport
from engine.orphan_watch import exit_with_parent
from engine.vllm_compat import app_args_of
from scheduler.iteration import IterationPlanner, IterationState


class HybridSchedulerMixin:
    """Adds fine-tune tasks to a vLLM scheduler; see the module docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        exit_with_parent()
        config: AppArgs = app_args_of(self.vllm_config)  # type: ignore[attr-defined]
        self._planner = IterationPlanner(config.scheduler, config.slo)
        self._tasks: dict[str, Request] = {}
        self._directive = Directive()
        self._iteration_started_s = 0.0

    def add_request(self, request: Request) -> None:
        """Queue a request with vLLM, or take a fine-tune task aside."""
        task = _task_of(request)
        if task is None:
            super().add_request(request)  # type: ignore[misc]
            return
        self._tasks[request.request_id] = request
        self._directive.new_tasks.append({**task, "task_id": request.request_id})

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """End requests from outside (client gone, shutdown); tasks are aborted in the worker."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        ids = None if request_ids is None else list(request_ids)
        ended = []
        for task_id in list(self._tasks) if ids is None else [i for i in ids if i in self._tasks]:
            request = self._tasks.pop(task_id)
            request.status = finished_status
            self._directive.aborted_task_ids.append(task_id)
            ended.append(request)
        return [*super().finish_requests(ids, finished_status), *ended]  # type: ignore[misc]

    def has_requests(self) -> bool:
        """Keeps the engine stepping while fine-tune work is left, or an abort must reach the worker."""
        if super().has_requests():  # type: ignore[misc]
            return True
        if self.pause_state != PauseState.UNPAUSED:  # type: ignore[attr-defined]
            return False
        return bool(self._tasks or self._directive.aborted_task_ids)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's schedule, with this iteration's fine-tune budget attached."""
        self._iteration_started_s = time.perf_counter()
        output = super().schedule(throttle_prefills)  # type: ignore[misc]
        plan = self._planner.plan(self._state_of(output))
        directive, self._directive = self._directive, Directive()
        directive.finetune_budget_s = plan.finetune_budget_s
        directive.min_slices = plan.min_slices
        setattr(output, DIRECTIVE_ATTRIBUTE, directive)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, plus the results of fine-tune tasks that ended in this iteration."""
        report: IterationReport | None = getattr(model_runner_output, REPORT_ATTRIBUTE, None)
        if report is not None:
            spent_s = report.forward_s + sum(s.latency_s for s in report.finetune.slices)
            wall_s = time.perf_counter() - self._iteration_started_s
            self._planner.observe(
                scheduler_output.total_num_scheduled_tokens, report.forward_s, max(0.0, wall_s - spent_s)
            )
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for result in report.finetune.finished if report is not None else ():
            self._emit(result, outputs)
        return outputs

    def _emit(self, result: TaskResult, outputs: dict[int, EngineCoreOutputs]) -> None:
        request = self._tasks.pop(result.task_id, None)
        if request is None:  # aborted meanwhile
            return
        request.status = RequestStatus.FINISHED_STOPPED
        core_outputs = outputs.setdefault(request.client_index, EngineCoreOutputs())
        core_outputs.outputs.append(
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=FinishReason.STOP,
                kv_transfer_params=result.to_wire(),
            )
        )

    def _state_of(self, output: SchedulerOutput) -> IterationState:
        num_decode = num_prefill = 0
        requests: dict[str, Request] = self.requests  # type: ignore[attr-defined]
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            if requests[request_id].num_output_tokens > 0:
                num_decode += num_tokens
            else:
                num_prefill += num_tokens
        return IterationState(
            num_decode_tokens=num_decode,
            num_prefill_tokens=num_prefill,
            oldest_first_token_wait_s=self._oldest_wait_s(),
            has_finetune_work=bool(self._tasks),
        )

    def _oldest_wait_s(self) -> float | None:
        """Seconds that the longest-waiting request without a first token has waited."""
        arrivals = [
            request.arrival_time
            for queue in (self.waiting, self.running)  # type: ignore[attr-defined]
            for request in queue
            if request.num_output_tokens == 0
        ]
        return max(0.0, time.time() - min(arrivals)) if arrivals else None


class HybridScheduler(HybridSchedulerMixin, Scheduler):
    """For engines without async scheduling (CPU)."""


class AsyncHybridScheduler(HybridSchedulerMixin, AsyncScheduler):
    """For engines with async scheduling (one GPU); a plain Scheduler subclass would turn it off."""


def _task_of(request: Request) -> dict[str, Any] | None:
    params = request.sampling_params
    if params is None or not params.extra_args:
        return None
    return params.extra_args.get(TASK_KEY)
