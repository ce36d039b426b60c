"""vLLM's worker plus fine-tune slices, on the same device and between the same forward passes.

An iteration is: slices within the scheduler's budget, then vLLM's forward pass and sampling. Slices come first so
that the tokens of this iteration leave as soon as they exist; the time between two tokens is the same either way.
"""

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from core.batch import IterationSample
from core.errors import ConfigError, MaceError
from core.types import SliceReport
from engine.pruning.pruner import unsupported
from engine.pruning.worker import Scores, WorkerPruning, statistics_share, to_wire
from engine.training.base_weights import huggingface_views, is_shared, unpacked_cpu_weights
from engine.training.device_memory import (
    begin_peak,
    free_memory_bytes,
    graph_pool_bytes,
    is_out_of_memory,
    peak_above_now,
)
from engine.training.runner import FineTuneRunner
from engine.training.shadow import ShadowAdapter
from engine.vllm.arrivals import ArrivalCount
from engine.vllm.compat import app_args_of, exit_with_parent, gpu_nvml, keep_out_of_compile_key, share_gloo_device
from engine.vllm.directive import (
    DIRECTIVE_ATTRIBUTE,
    REPORT_ATTRIBUTE,
    Directive,
    IterationReport,
    MemoryCounters,
    WorkerFacts,
)
from engine.vllm.iteration_log import ForwardTimer, IterationLog
from engine.vllm.recovery import empty_batch
from profiler.energy import find_meter

logger = logging.getLogger(__name__)


class HybridWorkerMixin:
    """Adds a `FineTuneRunner` to a vLLM worker; see the module docstring."""

    _runner: FineTuneRunner | None = None
    _facts: WorkerFacts | None = None
    """To be sent with the next report."""
    _pruning: WorkerPruning | None = None
    _pruning_refusal: str | None = None
    _kv_scores: Scores = {}  # noqa: RUF012 - replaced, never changed
    _memory = MemoryCounters()
    _epoch = 0
    _failure: str | None = None
    """What the last forward pass raised, until the scheduler begins a new epoch; nothing runs meanwhile."""
    _found_no_memory = False
    """That was a lack of memory."""
    _logged: str | None = None
    _weights: dict[str, int] = {}  # noqa: RUF012 - replaced, never changed
    _activation_bytes = 0
    """Memory that vLLM's largest forward pass takes for its duration, as measured before the KV cache was laid out."""
    _log: IterationLog
    _arrivals: ArrivalCount
    _directive: Directive
    _finetune_report: SliceReport
    _timer: ForwardTimer

    def init_device(self) -> None:
        """vLLM's, but that the process groups of a single rank do with one thread."""
        if self.vllm_config.parallel_config.world_size == 1:  # type: ignore[attr-defined]
            share_gloo_device()
        super().init_device()  # type: ignore[misc]
        keep_out_of_compile_key()

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
                served_tokens=model_config.max_model_len,
            )
            self._weights = self._runner.describe()

    def determine_available_memory(self) -> int:
        """vLLM's bytes for the KV cache, less what the statistics of KV pruning take beside it.

        A size that the settings name stays: the statistics then come out of what is left on the device.
        """
        device, config = self.device, self.vllm_config  # type: ignore[attr-defined]
        is_set = config.cache_config.kv_cache_memory_bytes is not None
        begin_peak(device)
        available: int = super().determine_available_memory()  # type: ignore[misc]
        self._activation_bytes = peak_above_now(device)
        if is_set or app_args_of(config).kv_pruning.start == "off":
            return available
        return int(available * (1 - statistics_share(config, self.get_kv_cache_spec())))  # type: ignore[attr-defined]

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's last preparation before it serves; what is free on the device after it, training may use."""
        if app_args_of(self.vllm_config).kv_pruning.start != "off":  # type: ignore[attr-defined]
            runner = self.model_runner  # type: ignore[attr-defined]
            self._pruning_refusal = unsupported(runner.vllm_config, runner.kv_cache_config)
            self._pruning = WorkerPruning(runner) if self._pruning_refusal is None else None
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        if self._runner is not None:
            device = self.device  # type: ignore[attr-defined]
            kept = {
                "activations": self._activation_bytes,
                "graph_pools": graph_pool_bytes(device),
                "unpacked_layer": self._runner.model.unpacked_bytes,
            }
            held = self._runner.shadow.memory()
            if self._pruning is not None:
                held["pruning_statistics"] = self._pruning.statistics_bytes
            self._runner.kept_free_bytes = sum(kept.values())
            self._facts = WorkerFacts(self._runner.warm_up_slices, free_memory_bytes(device), kept, held)
        return result

    def execute_model(self, scheduler_output: Any) -> Any:
        """Slices, then vLLM's forward pass. Returns None when `sample_tokens` follows.

        What the forward pass raises comes back as a report, unless there was nothing to compute: then the fault is
        no request's.
        """
        self._directive = directive = getattr(scheduler_output, DIRECTIVE_ATTRIBUTE, None) or Directive()
        if directive.epoch != self._epoch:
            empty_batch(self.model_runner)  # type: ignore[attr-defined]
            self._epoch, self._failure = directive.epoch, None
            if self._found_no_memory and self._runner is not None:
                self._runner.make_room(self._logged or "")
            self._found_no_memory = False
        self._finetune_report = self._run_slices(directive)
        self._timer = ForwardTimer(self.device)  # type: ignore[attr-defined]
        self._memory = directive.memory
        if self._failure is not None:
            return _failed(self._failure, self._finetune_report)
        try:
            return self._finish(self._forward(scheduler_output))
        except Exception as error:
            if not scheduler_output.total_num_scheduled_tokens:
                raise
            return self._fail(error, self._finetune_report)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """vLLM's sampling; its output carries the iteration's report, and what sampling or the pass before raised."""
        if self._failure is not None:
            return _failed(self._failure, self._finetune_report)
        try:
            return self._finish(super().sample_tokens(grammar_output))  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - whatever it is, the scheduler finds out whose
            return self._fail(error, self._finetune_report)

    def _forward(self, scheduler_output: Any) -> Any:
        if self._pruning is None:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        self._pruning.drop(self._directive.dropped_blocks)
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        self._kv_scores = self._pruning.score(
            self._directive.score_request_ids, scheduler_output.num_scheduled_tokens
        )
        return output

    def _fail(self, error: Exception, finetune: SliceReport) -> ModelRunnerOutput:
        """The output of an iteration that raised. Raises the error if vLLM has state that cannot be brought back."""
        config = self.vllm_config  # type: ignore[attr-defined]
        has_peers = config.parallel_config.world_size > 1 or config.kv_transfer_config or config.ec_transfer_config
        if has_peers or config.speculative_config:
            raise error
        lines = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        if text != self._logged:
            logger.error("an iteration failed: %s", text, exc_info=error)
            self._logged = text
        if self.device.type == "cuda":  # type: ignore[attr-defined]
            torch.cuda.synchronize(self.device)  # type: ignore[attr-defined] # raises if the device is lost
        self._failure, self._found_no_memory = text, is_out_of_memory(error)
        return _failed(text, finetune)

    def mace_call(self, method: str, *args: Any) -> dict[str, Any]:
        """Answer `HybridEngine` between two iterations (through `collective_rpc`).

        `iterations` (`IterationLog.since`), `memory` (`memory_status`), `measure_work`, `pruning_refusal` (the reason
        why KV blocks cannot be dropped although the settings ask for it, or None), and the methods of `ShadowAdapter`.

        Returns `{"value": ...}`, or `{"error": class name, "message": ...}` for errors of our tree: vLLM would turn
        an exception into text.
        """
        try:
            return {"value": self._method(method)(*args)}
        except MaceError as error:
            return {"error": type(error).__name__, "message": str(error)}

    def memory_status(self) -> dict[str, Any]:
        """`MemoryCounters` of the last iteration, the trainer's weights, and where its movable work runs."""
        status: dict[str, Any] = {**asdict(self._memory), **self._weights}
        if self._runner is not None:
            status["offload"] = {kind.value: asdict(placed) for kind, placed in self._runner.placements.items()}
        return status

    def measure_work(self) -> dict[str, Any]:
        """What movable work of the trainer costs on either device (`FineTuneRunner.measure_work`); takes seconds."""
        costs = {} if self._runner is None else self._runner.measure_work(find_meter(gpu_nvml()))
        return {
            kind.value: {place: asdict(cost) for place, cost in found.items()} for kind, found in costs.items()
        }

    def _method(self, name: str) -> Callable[..., Any]:
        if name == "iterations":
            return self._log.since
        if name == "memory":
            return self.memory_status
        if name == "measure_work":
            return self.measure_work
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
            return _ReportingAsyncOutput(output, with_report, lambda error: self._fail(error, finetune))
        return with_report(output)


def _failed(failure: str, finetune: SliceReport) -> ModelRunnerOutput:
    output = copy.copy(EMPTY_MODEL_RUNNER_OUTPUT)
    setattr(output, REPORT_ATTRIBUTE, IterationReport(finetune, 0.0, failure=failure))
    return output


class _ReportingAsyncOutput(AsyncModelRunnerOutput):
    """Adds the report when the copy to the host is done (async scheduling on GPU)."""

    def __init__(
        self,
        inner: AsyncModelRunnerOutput,
        finish: Callable[[ModelRunnerOutput], ModelRunnerOutput],
        fail: Callable[[Exception], ModelRunnerOutput],
    ) -> None:
        self._inner = inner
        self._finish = finish
        self._fail = fail

    def get_output(self) -> ModelRunnerOutput:
        try:
            return self._finish(self._inner.get_output())
        except Exception as error:  # noqa: BLE001
            return self._fail(error)
