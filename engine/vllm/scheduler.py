"""vLLM's scheduler under our plan: each iteration's token budget, waiting order and fine-tune slices.

Allocation of KV blocks, preemption and sampling stay vLLM's own. Before it schedules, the planner sets the token
budget and the longest prefill chunk; after, it says what the iteration may spend on fine-tuning, and a `Directive`
takes that to the worker. A request whose `extra_args` hold `TASK_KEY` is a fine-tune task: `engine.vllm.task_table`
keeps it aside, and it ends as an `EngineCoreOutput` whose `kv_transfer_params` carry the `TaskResult`. One with
`NOTE_KEY` is a message to the planner (what clients saw, other targets), and is gone once it is read.

With async scheduling vLLM sends an iteration to the worker while the output of the one before is still to come. Slices
would hold that output back, and begin before the device is free. So they run only in an iteration that is alone in
flight: one that is due makes vLLM take in all outputs first (`has_requests`). Pure serving keeps its overlap.

Invariant: nothing in here may raise because of a fine-tune task; an exception would end the engine. What the worker's
forward pass raises comes here as a report, and `engine.vllm.recovery` finds the request that it belongs to.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from core.batch import EdgeReport, ForwardShape, IterationSample, Plan
from core.config import AppArgs, SloConfig
from core.errors import LedgerError
from core.types import SliceReport, TaskKind, TaskResult
from engine.pruning.pruner import KvPruner, unsupported
from engine.vllm.arrivals import ArrivalCount
from engine.vllm.compat import app_args_of, exit_with_parent
from engine.vllm.directive import (
    DIRECTIVE_ATTRIBUTE,
    NOTE_KEY,
    REPORT_ATTRIBUTE,
    TASK_KEY,
    Directive,
    IterationReport,
    MemoryCounters,
)
from engine.vllm.grammars import contain_failures, serve_each_backend
from engine.vllm.planning import KvPool, PrefixLookup, build_planner, is_decoding, shape_of, view_of
from engine.vllm.recovery import Recovery
from engine.vllm.task_table import TaskTable
from engine.vllm.waiting_queue import AgeingRequestQueue
from scheduler.memory.ledger import MemoryLedger, Pool
from scheduler.view import IterationView

logger = logging.getLogger(__name__)

_MOST_SKIPPED = 8
"""Overlapping iterations at most between two tries to run a slice in too little time."""


class HybridSchedulerMixin:
    """Adds plans and fine-tune tasks to a vLLM scheduler; see the module docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        exit_with_parent()
        serve_each_backend(self.structured_output_manager)  # type: ignore[attr-defined]
        contain_failures(self.structured_output_manager)  # type: ignore[attr-defined]
        config: AppArgs = app_args_of(self.vllm_config)  # type: ignore[attr-defined]
        self._args = config
        self._max_tokens: int = self.max_num_scheduled_tokens
        self._chunk_limit: int = self.scheduler_config.long_prefill_token_threshold  # type: ignore[attr-defined]
        self._num_seats: int = self.max_num_active_reqs  # type: ignore[has-type]
        """Of anybody; the worker has some more, for guests (`scheduler.queues.waiting`)."""
        pool = KvPool.of(self.kv_cache_config)  # type: ignore[attr-defined]
        self._pool = pool
        self._pruner = self._make_pruner(config)
        self._cached_prefix_of = PrefixLookup(self.kv_cache_manager, pool.block_tokens)  # type: ignore[attr-defined]
        self._num_preemptions = 0
        self.planner = build_planner(config, self, pool, can_prune=self._pruner is not None)
        self.waiting = AgeingRequestQueue(config.experiments, pool.block_tokens)
        self._tasks = TaskTable(share_prompts=config.experiments.share_prompt)
        self._directive = Directive()
        self._recovery = Recovery(self)
        self._last_training: Directive | None = None
        """The newest one that reserved memory for slices, until its report is here."""
        self._arrivals = ArrivalCount()
        self._num_arrived = 0
        self._num_in_flight = 0
        """Iterations that were scheduled and whose outputs are still to come."""
        self._slices_are_due = False
        """The newest plan has time for slices, and the next iteration waits for all outputs so that they can run."""
        self._num_vain = self._num_to_skip = 0
        """Iterations in a row that were alone for slices and ran none, and how many more may overlap for that."""
        self._last_ended_s = 0.0
        self._overhead_s = 0.0

    def add_request(self, request: Request) -> None:
        """Queue a request with vLLM, or take a fine-tune task aside."""
        if (note := _extra(request, NOTE_KEY)) is not None:
            self._take_note(note)
            return
        task = _extra(request, TASK_KEY)
        if task is None:
            self.planner.retrain.note_requests()
            super().add_request(request)  # type: ignore[misc]
            return
        self._tasks.add(request, task, time.time())
        self._directive.new_tasks.append({**task, "task_id": request.request_id})

    def _take_note(self, note: dict[str, Any]) -> None:
        try:
            if "edge" in note:
                self.planner.observe_edge(EdgeReport(**note["edge"]), time.time())
            if "slo" in note:
                self.planner.set_slo(SloConfig(**note["slo"]))
        except (TypeError, ValueError) as error:  # the engine must not end for it
            logger.warning("a note to the scheduler was not understood: %s", error)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """End requests from outside (client gone, shutdown); tasks are aborted in the worker."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        ids = None if request_ids is None else list(request_ids)
        ended = []
        for request in self._tasks.remove(ids):
            request.status = finished_status
            self._directive.aborted_task_ids.append(request.request_id)
            ended.append(request)
        return [*super().finish_requests(ids, finished_status), *ended]  # type: ignore[misc]

    def has_requests(self) -> bool:
        """Keeps the engine stepping while fine-tune work may run, or an abort must reach the worker.

        False while slices are due and outputs are still to come: vLLM takes these in before it asks again.
        """
        if self._num_in_flight and self._slices_are_due:
            return False
        if super().has_requests():  # type: ignore[misc]
            return True
        if self.pause_state != PauseState.UNPAUSED:  # type: ignore[attr-defined]
            return False
        if self._directive.aborted_task_ids:
            return True
        return self.planner.may_run(self._tasks.state(time.time()))

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's schedule within the plan's limits, with this iteration's fine-tune part attached."""
        # While somebody is served one iteration follows the other: what is between them is overhead, too.
        self._directive.started_s = self._last_ended_s if self.running else time.perf_counter()  # type: ignore[attr-defined]
        self._directive.num_arrived, self._num_arrived = self._num_arrived, self._arrivals.read()
        view = self._view(time.time())
        plan = self.planner.plan(view)
        if self._recovery.is_searching:  # the few that may run are not those that the plan was made for
            plan.token_budget, plan.max_chunk_tokens = self._max_tokens, 0
        if self._pruner is not None and plan.prune_blocks > 0:
            self._directive.dropped_blocks = self._pruner.prune(plan.prune_blocks, self.requests)  # type: ignore[attr-defined]
        self._apply(plan, view)
        output = super().schedule(throttle_prefills)  # type: ignore[misc]
        self._note_scheduled(output, plan)
        shape = shape_of(output.num_scheduled_tokens, self.requests, self._num_absent_tokens)  # type: ignore[attr-defined]
        directive, self._directive = self._directive, Directive()
        directive.plan, directive.shape = self._in_turn(self.planner.settle(plan, view, shape)), shape
        directive.overhead_s, directive.epoch = self._overhead_s, self._recovery.epoch
        if plan.reserves_arena:
            self._last_training = directive
        setattr(output, DIRECTIVE_ATTRIBUTE, directive)
        self._num_in_flight += 1
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, plus the results of fine-tune tasks that ended in this iteration, and what failures end.

        Raises:
            UnexplainedFailureError: iterations fail, and not because of a request. vLLM then ends the engine.
        """
        self._num_in_flight -= 1
        report: IterationReport | None = getattr(model_runner_output, REPORT_ATTRIBUTE, None)
        directive: Directive = getattr(scheduler_output, DIRECTIVE_ATTRIBUTE)
        if report is not None:
            self._observe(directive, report)
        ended: dict[str, str] = {}
        is_void = directive.epoch != self._recovery.epoch
        if report is not None and report.failure is not None and not is_void:
            ended = self._recovery.failed(scheduler_output.num_scheduled_tokens, report.failure)
            is_void = True
        if is_void:
            self._recovery.forget_finished(scheduler_output.finished_req_ids)
            model_runner_output = EMPTY_MODEL_RUNNER_OUTPUT
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if not is_void:
            ended = self._recovery.succeeded()
        if ended:
            self._end(ended, outputs)
        for result in report.finetune.finished if report is not None else ():
            self._emit(result, outputs)
        return outputs

    def _in_turn(self, plan: Plan) -> Plan:
        """The plan, whose slices wait for the next iteration while outputs are still to come.

        Where the time is too short for the slice that comes next, being alone costs the overlap for nothing. So the
        more often in a row none ran, the more iterations pass before the next try.
        """
        self._slices_are_due = plan.runs_slices and (plan.has_to_run_slices or not self._num_to_skip)
        self._num_to_skip = max(0, self._num_to_skip - 1)
        return plan.without_slices() if self._num_in_flight else plan

    def _view(self, now_s: float) -> IterationView:
        self.waiting.now_s = now_s
        self.waiting.note_running(self.running)  # type: ignore[attr-defined]
        self._seat_guest()
        return view_of(
            now_s,
            self.running,  # type: ignore[attr-defined]
            self.waiting,
            free_seats=max(0, self.max_num_active_reqs - len(self.running)),  # type: ignore[attr-defined]
            pool=self._pool,
            free_kv_blocks=self._num_free_kv_blocks(),
            prune_offer=None if self._pruner is None else self._pruner.offer(),
            num_absent_tokens=self._num_absent_tokens,
            cached_prefix_of=self._cached_prefix_of,
            finetune=self._tasks.state(now_s) if self._may_train else None,
        )

    @property
    def _may_train(self) -> bool:
        """A paused engine may have its weights asleep; only what vLLM itself still runs goes on."""
        return self.pause_state == PauseState.UNPAUSED and not self._recovery.is_searching  # type: ignore[attr-defined]

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return self._recovery.admits(request) and super()._handle_blocked_waiting_request(request)  # type: ignore[misc]

    def _seat_guest(self) -> None:
        """While all seats are taken, one more for a client that holds none."""
        num_running = len(self.running)  # type: ignore[attr-defined]
        is_full = self._num_seats <= num_running < self.max_num_running_reqs  # type: ignore[attr-defined]
        has_guest = self.waiting.invite(self.running) if is_full else False  # type: ignore[attr-defined]
        self.max_num_active_reqs = num_running + 1 if has_guest else self._num_seats

    def _num_free_kv_blocks(self) -> int:
        num_free: int = self.kv_cache_manager.block_pool.get_num_free_blocks()  # type: ignore[attr-defined]
        return self._pool.free_blocks(num_free)

    def _make_pruner(self, config: AppArgs) -> KvPruner | None:
        """None: switched off, or impossible with this model (said in the log)."""
        if config.kv_pruning.start == "off":
            return None
        reason = unsupported(self.vllm_config, self.kv_cache_config)  # type: ignore[attr-defined]
        if reason is not None:
            logger.warning("kv_pruning stays off: %s", reason)
            return None
        return KvPruner(config.kv_pruning, self.kv_cache_manager, self._pool.block_tokens)  # type: ignore[attr-defined]

    @property
    def _num_absent_tokens(self) -> int:
        return 0 if self._pruner is None else self._pruner.num_absent_tokens

    def _note_scheduled(self, output: SchedulerOutput, plan: Plan) -> None:
        """Tell the pruner of the forward pass, and the worker the counters that others ask it for."""
        directive, pruner, memory = self._directive, self._pruner, self.planner.memory
        directive.memory = MemoryCounters(
            self._pool.num_blocks,
            self._num_free_kv_blocks(),
            preemptions=self._num_preemptions,
            arena_capacity_bytes=memory.pool_capacity_bytes(Pool.ARENA),
            arena_used_bytes=memory.pool_used_bytes(Pool.ARENA),
            entries=memory.entries,
            ledger_error=_ledger_error(memory),
        )
        if pruner is None:
            return
        directive.memory.pruned_blocks, directive.memory.pruned_requests = pruner.num_dropped, pruner.num_requests
        for new in output.scheduled_new_reqs:
            pruner.note_prefix_hit(new.req_id, new.num_computed_tokens)
        if plan.wants_prune_scores:
            directive.score_request_ids = pruner.to_score(self.running)  # type: ignore[attr-defined]

    def _free_request_blocks(self, request: Request) -> None:
        if self._pruner is not None:
            self._pruner.forget(request.request_id, has_ended=request.is_finished())
        super()._free_request_blocks(request)  # type: ignore[misc]

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._num_preemptions += 1
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _apply(self, plan: Plan, view: IterationView) -> None:
        """Set vLLM's own limits for this iteration; its configured ones stay the upper bound."""
        self.max_num_scheduled_tokens = min(self._max_tokens, plan.token_budget)
        limits = [limit for limit in (plan.max_chunk_tokens, self._chunk_limit) if limit > 0]
        self.scheduler_config.long_prefill_token_threshold = min(limits, default=0)  # type: ignore[attr-defined]
        if view.num_decode and view.prefills and view.prefills[0].is_running:
            # vLLM goes through the running requests in order: a long prompt must not take the tokens of those
            # that decode. The sort is stable.
            self.running.sort(key=lambda request: not is_decoding(request, request.num_computed_tokens))  # type: ignore[attr-defined]

    def _observe(self, directive: Directive, report: IterationReport) -> None:
        if report.facts is not None:  # the warm-up slices: no kind is unknown to the planner from here on
            facts, wanted = report.facts, self._args.training.arena_bytes
            self.planner.memory.note_device(facts.free_bytes, facts.kept, facts.held, wanted)
            self.planner.observe(IterationSample(ForwardShape(), 0.0, report=SliceReport(report.facts.warm_up)))
        if self._pruner is not None:
            self._pruner.note_scores(report.kv_scores, self.requests)  # type: ignore[attr-defined]
        slices_s = sum(s.latency_s for s in report.finetune.slices)
        now_s = time.perf_counter()
        # With two iterations in flight the time since the last one ended is this one's. No slices of the next one are
        # in it (`_in_turn`).
        wall_s = now_s - max(directive.started_s, self._last_ended_s)
        self._last_ended_s = now_s
        if report.failure is None:  # of a pass that failed there is no time to take off
            self._overhead_s = max(0.0, wall_s - report.forward_s - slices_s)
        shape = directive.shape if report.failure is None else ForwardShape()
        self.planner.observe(
            IterationSample(shape, report.forward_s, self._overhead_s, report.finetune, directive.plan)
        )
        if directive.plan.runs_slices:
            has_run = bool(report.finetune.slices or report.finetune.finished)
            self._num_vain = 0 if has_run else min(self._num_vain + 1, _MOST_SKIPPED)
            self._num_to_skip = self._num_vain
        self._tasks.note_progress(report.finetune, time.time())
        if directive is self._last_training:
            self._last_training = None
        # Two iterations are in flight with async scheduling: the next may have reserved memory for a step it starts.
        if not report.finetune.activation_bytes and self._last_training is None:
            self.planner.memory.record(Pool.ARENA, 0)

    def _emit(self, result: TaskResult, outputs: dict[int, EngineCoreOutputs]) -> None:
        task = self._tasks.pop(result.task_id)
        if task is None:  # aborted meanwhile
            return
        if result.kind is TaskKind.TRAIN and result.error is None:
            self.planner.retrain.note_trained(task.num_pairs)
        task.request.status = RequestStatus.FINISHED_STOPPED
        _append(outputs, task.request, FinishReason.STOP, result.to_wire())

    def _end(self, errors: dict[str, str], outputs: dict[int, EngineCoreOutputs]) -> None:
        """End the requests that made iterations fail."""
        for request in self.finish_requests(errors, RequestStatus.FINISHED_ERROR):
            logger.warning(
                "request %s is ended: it fails alone: %s", request.request_id, errors[request.request_id]
            )
            _append(outputs, request, FinishReason.ERROR)


class HybridScheduler(HybridSchedulerMixin, Scheduler):
    """Scheduler of engines without async scheduling (CPU)."""


class AsyncHybridScheduler(HybridSchedulerMixin, AsyncScheduler):
    """Scheduler of engines with async scheduling (one GPU); a plain Scheduler subclass would turn it off."""


def _append(
    outputs: dict[int, EngineCoreOutputs],
    request: Request,
    reason: FinishReason,
    payload: dict[str, Any] | None = None,
) -> None:
    """Tell the front end that a request has ended, with no further token."""
    output = EngineCoreOutput(request.request_id, [], finish_reason=reason, kv_transfer_params=payload)
    outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)


def _ledger_error(memory: MemoryLedger) -> str | None:
    try:
        memory.check_integrity()
    except LedgerError as error:
        return str(error)
    return None


def _extra(request: Request, key: str) -> dict[str, Any] | None:
    params = request.sampling_params
    if params is None or not params.extra_args:
        return None
    return params.extra_args.get(key)
