"""vLLM's worker plus fine-tune slices, on the same device and between the same forward passes.

An iteration is: slices within the scheduler's budget, then vLLM's forward pass and sampling. Slices come first so
that the tokens of this iteration leave as soon as they exist; the time between two tokens is the same either way.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from core.batch import IterationSample
from core.errors import ConfigError, MaceError
from core.types import SliceReport
from engine.pruning.pruner import unsupported
from engine.pruning.worker import Scores, WorkerPruning, to_wire
from engine.training.base_weights import huggingface_views, is_shared, unpacked_cpu_weights
from engine.training.runner import FineTuneRunner, free_memory_bytes
from engine.training.shadow import ShadowAdapter
from engine.vllm.arrivals import ArrivalCount
from engine.vllm.compat import app_args_of, exit_with_parent
from engine.vllm.directive import (
    DIRECTIVE_ATTRIBUTE,
    REPORT_ATTRIBUTE,
    Directive,
    IterationReport,
    MemoryCounters,
    WorkerFacts,
)
from engine.vllm.iteration_log import ForwardTimer, IterationLog


class HybridWorkerMixin:
    """Adds a `FineTuneRunner` to a vLLM worker; see the module docstring."""

    _runner: FineTuneRunner | None = None
    _facts: WorkerFacts | None = None
    """To be sent with the next report."""
    _pruning: WorkerPruning | None = None
    _pruning_refusal: str | None = None
    _kv_scores: Scores = {}  # noqa: RUF012 - replaced, never changed
    _memory = MemoryCounters()
    _weights: dict[str, int] = {}  # noqa: RUF012 - replaced, never changed
    _log: IterationLog
    _arrivals: ArrivalCount
    _directive: Directive
    _finetune_report: SliceReport
    _timer: ForwardTimer

    def load_model(self, **kwargs: Any) -> None:
        """Load the inference model, then the trainable model beside it (or on its very weights)."""
        exit_with_parent()
        self._log = IterationLog()
        self._arrivals = ArrivalCount()
        args = app_args_of(self.vllm_config)  # type: ignore[attr-defined]
        shared = args.training.enabled and is_shared(args.engine, self.device.type)  # type: ignore[attr-defined]
        with unpacked_cpu_weights() if shared else nullcontext():
            super().load_model(**kwargs)  # type: ignore[misc]
        if args.training.enabled:
            model_config = self.vllm_config.model_config  # type: ignore[attr-defined]
            self._runner = FineTuneRunner(
                model_dir=model_config.model,
                args=args,
                dtype=model_config.dtype,
                device=self.device,  # type: ignore[attr-defined]
                weights=huggingface_views(self.get_model(), model_config.hf_text_config) if shared else None,  # type: ignore[attr-defined]
            )
            self._weights = self._runner.describe()

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's last preparation before it serves; what is free on the device after it, training may use."""
        if app_args_of(self.vllm_config).kv_pruning.start != "off":  # type: ignore[attr-defined]
            runner = self.model_runner  # type: ignore[attr-defined]
            self._pruning_refusal = unsupported(runner.vllm_config, runner.kv_cache_config)
            self._pruning = WorkerPruning(runner) if self._pruning_refusal is None else None
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        if self._runner is not None:
            free_bytes = free_memory_bytes(self.device)  # type: ignore[attr-defined]
            self._facts = WorkerFacts(self._runner.warm_up_slices, free_bytes)
        return result

    def execute_model(self, scheduler_output: Any) -> Any:
        """Slices, then vLLM's forward pass. Returns None when `sample_tokens` follows."""
        self._directive = getattr(scheduler_output, DIRECTIVE_ATTRIBUTE, None) or Directive()
        self._finetune_report = self._run_slices(self._directive)
        self._timer = ForwardTimer(self.device)  # type: ignore[attr-defined]
        self._memory = self._directive.memory
        if self._pruning is None:
            return self._finish(super().execute_model(scheduler_output))  # type: ignore[misc]
        self._pruning.drop(self._directive.dropped_blocks)
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        self._kv_scores = self._pruning.score(
            self._directive.score_request_ids, scheduler_output.num_scheduled_tokens
        )
        return self._finish(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """vLLM's sampling; its output carries the iteration's report."""
        return self._finish(super().sample_tokens(grammar_output))  # type: ignore[misc]

    def mace_call(self, method: str, *args: Any) -> dict[str, Any]:
        """Answer `HybridEngine` between two iterations (through `collective_rpc`).

        `iterations` (`IterationLog.since`), `memory` (`memory_status`), `pruning_refusal` (the reason why KV blocks
        cannot be dropped although the settings ask for it, or None), and the methods of `ShadowAdapter`.

        Returns `{"value": ...}`, or `{"error": class name, "message": ...}` for errors of our tree: vLLM would turn
        an exception into text.
        """
        try:
            return {"value": self._method(method)(*args)}
        except MaceError as error:
            return {"error": type(error).__name__, "message": str(error)}

    def memory_status(self) -> dict[str, Any]:
        """`MemoryCounters` of the last iteration, and the trainer's weights."""
        return {**asdict(self._memory), **self._weights}

    def _method(self, name: str) -> Callable[..., Any]:
        if name == "iterations":
            return self._log.since
        if name == "memory":
            return self.memory_status
        if name == "pruning_refusal":
            return lambda: self._pruning_refusal
        if self._runner is None:
            raise ConfigError("training is disabled in this engine (training.enabled: false)")
        if name not in ShadowAdapter.REMOTE_METHODS:
            raise ConfigError(f"not a remote method of the fine-tune runner: {name}")
        return getattr(self._runner.shadow, name)

    def _run_slices(self, directive: Directive) -> SliceReport:
        if self._runner is None:
            return SliceReport()
        for task in directive.new_tasks:
            self._runner.submit(task)
        for task_id in directive.aborted_task_ids:
            self._runner.abort(task_id)
        plan = directive.plan
        if plan.is_blocking:
            return self._runner.run_step()
        self._runner.set_slice_tokens(plan.slice_tokens)
        return self._runner.run(
            plan.finetune_budget_s, plan.min_slices, lambda: self._arrivals.read() != directive.num_arrived
        )

    def _finish(self, output: Any) -> Any:
        if output is None:
            return None
        self._timer.stop()
        # With async scheduling the next iteration begins before this one's output is read.
        directive, finetune, timer, scores = self._directive, self._finetune_report, self._timer, self._kv_scores

        def with_report(output: ModelRunnerOutput) -> ModelRunnerOutput:
            forward_s = timer.seconds()
            self._log.add(
                IterationSample(directive.shape, forward_s, directive.overhead_s, finetune, directive.plan)
            )
            facts, self._facts = self._facts, None
            output = copy.copy(output)  # vLLM's empty output is one shared constant
            setattr(output, REPORT_ATTRIBUTE, IterationReport(finetune, forward_s, facts, to_wire(scores)))
            return output

        if isinstance(output, AsyncModelRunnerOutput):
            return _ReportingAsyncOutput(output, with_report)
        return with_report(output)


class _ReportingAsyncOutput(AsyncModelRunnerOutput):
    """Adds the report when the copy to the host is done (async scheduling on GPU)."""

    def __init__(
        self, inner: AsyncModelRunnerOutput, finish: Callable[[ModelRunnerOutput], ModelRunnerOutput]
    ) -> None:
        self._inner = inner
        self._finish = finish

    def get_output(self) -> ModelRunnerOutput:
        return self._finish(self._inner.get_output())
