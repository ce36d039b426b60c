"""vLLM's worker plus fine-tune slices, on the same device and between the same forward passes.

An iteration is: slices within the scheduler's budget, then vLLM's forward pass and sampling. Slices come first so
that the tokens of this iteration leave as soon as they exist; the time between two tokens is the same either way.
"""

import copy
import time
from contextlib import nullcontext
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from core.config import AppArgs
from core.errors import ConfigError, MaceError
from core.types import SliceReport
from engine.base_weights import WeightViews, huggingface_views, is_shared, unpacked_cpu_weights
from engine.finetune_runner import FineTuneRunner
from engine.messages import DIRECTIVE_ATTRIBUTE, REPORT_ATTRIBUTE, Directive, IterationReport
from engine.orphan_watch import exit_with_parent
from engine.vllm_compat import app_args_of


class HybridWorkerMixin:
    """Adds a `FineTuneRunner` to a vLLM worker; see the module docstring."""

    _runner: FineTuneRunner | None = None
    _finetune_report: SliceReport
    _forward_started_s: float

    def load_model(self, **kwargs: Any) -> None:
        """Load the inference model, then the trainable model beside it (or on its very weights)."""
        exit_with_parent()
        args = app_args_of(self.vllm_config)  # type: ignore[attr-defined]
        shared = args.training.enabled and is_shared(args.engine, self.device.type)  # type: ignore[attr-defined]
        with unpacked_cpu_weights() if shared else nullcontext():
            super().load_model(**kwargs)  # type: ignore[misc]
        if args.training.enabled:
            self._runner = self._build_runner(args, shared)

    def _build_runner(self, args: AppArgs, shared: bool) -> FineTuneRunner:
        model_config = self.vllm_config.model_config  # type: ignore[attr-defined]
        weights: WeightViews | None = None
        if shared:
            weights = huggingface_views(self.get_model(), model_config.hf_text_config)  # type: ignore[attr-defined]
        return FineTuneRunner.build(
            model_dir=model_config.model,
            args=args,
            dtype=model_config.dtype,
            device=self.device,  # type: ignore[attr-defined]
            weights=weights,
        )

    def execute_model(self, scheduler_output: Any) -> Any:
        """Slices, then vLLM's forward pass. Returns None when `sample_tokens` follows."""
        directive: Directive = getattr(scheduler_output, DIRECTIVE_ATTRIBUTE, None) or Directive()
        self._finetune_report = self._run_slices(directive)
        self._forward_started_s = time.perf_counter()
        return self._finish(super().execute_model(scheduler_output))  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        """vLLM's sampling; its output carries the iteration's report."""
        return self._finish(super().sample_tokens(grammar_output))  # type: ignore[misc]

    def mace_call(self, method: str, *args: Any) -> dict[str, Any]:
        """Call a public method of the runner between two iterations (through `collective_rpc`).

        Returns `{"value": ...}`, or `{"error": class name, "message": ...}` for errors of our tree: vLLM would turn
        an exception into text.
        """
        if self._runner is None:
            return _error(ConfigError("training is disabled in this engine (training.enabled: false)"))
        if method not in FineTuneRunner.REMOTE_METHODS:
            return _error(ConfigError(f"not a remote method of the fine-tune runner: {method}"))
        try:
            return {"value": getattr(self._runner, method)(*args)}
        except MaceError as error:
            return _error(error)

    def _run_slices(self, directive: Directive) -> SliceReport:
        if self._runner is None:
            return SliceReport()
        for task in directive.new_tasks:
            self._runner.submit(task)
        for task_id in directive.aborted_task_ids:
            self._runner.abort(task_id)
        return self._runner.run(directive.finetune_budget_s, directive.min_slices)

    def _finish(self, output: Any) -> Any:
        if output is None:
            return None
        if isinstance(output, AsyncModelRunnerOutput):
            return _ReportingAsyncOutput(output, self._finetune_report, self._forward_started_s)
        return _with_report(output, self._finetune_report, self._forward_started_s)


class _ReportingAsyncOutput(AsyncModelRunnerOutput):
    """Adds the report when the copy to the host is done (async scheduling on GPU)."""

    def __init__(self, inner: AsyncModelRunnerOutput, finetune: SliceReport, forward_started_s: float) -> None:
        self._inner = inner
        self._finetune = finetune
        self._forward_started_s = forward_started_s

    def get_output(self) -> ModelRunnerOutput:
        return _with_report(self._inner.get_output(), self._finetune, self._forward_started_s)


def _error(error: MaceError) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": str(error)}


def _with_report(output: ModelRunnerOutput, finetune: SliceReport, forward_started_s: float) -> ModelRunnerOutput:
    """A copy with the report: vLLM's empty output is one shared constant."""
    output = copy.copy(output)
    setattr(output, REPORT_ATTRIBUTE, IterationReport(finetune, time.perf_counter() - forward_started_s))
    return output
