"""Runs fine-tune tasks slice by slice inside the worker process. Knows torch, not vLLM.

Tasks run one at a time, in order of arrival (the central scheduler has ordered them). Invariants: `run` never
raises because of a task, an error is that task's result; beyond `min_slices` it never starts a slice whose upper
estimate does not fit into the rest of the budget.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from core.config import AppArgs
from core.dpo_slices import SliceSpec
from core.errors import ConfigError, DeviceMemoryError
from core.offload import WorkKind
from core.types import FineTuneTask, SliceKind, SliceReport, SliceTiming, TaskKind, TaskResult, TokenizedPair
from engine.training.device_memory import free_memory_bytes, is_out_of_memory, release_cached_memory
from engine.training.dpo import DpoStep
from engine.training.offload import Costs, measure_work, place_all, settled_s
from engine.training.shadow import ShadowAdapter
from engine.training.trainable import TrainableModel
from profiler.energy import EnergyMeter
from scheduler.iteration.slices import SliceAdmission

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = 16
_CHECKPOINT_WAIT_S = 1e-3


@dataclass(slots=True)
class _RunningStep:
    """The step in progress."""

    task: FineTuneTask
    step: DpoStep
    slice_tokens: int
    result: TaskResult
    """Its cost so far; metrics and scores come at the end."""


class FineTuneRunner:
    """Owner of the trainable model, the shadow adapter and the task in progress."""

    def __init__(
        self,
        *,
        model_dir: str,
        args: AppArgs,
        dtype: torch.dtype,
        device: torch.device,
        weights: Mapping[str, torch.Tensor] | None,
        served_tokens: int | None = None,
    ) -> None:
        """Build the trainable model (raises as `TrainableModel.build` does) and measure every kind of slice once."""
        self._config = args.training
        self._share_prompt = args.experiments.share_prompt
        self.model = TrainableModel.build(
            model_dir,
            args.lora,
            dtype=dtype,
            device=device,
            seed=self._config.seed,
            weights=weights,
            served_tokens=served_tokens,
        )
        self._shared_pointers = frozenset(tensor.data_ptr() for tensor in (weights or {}).values())
        self._args = args
        self.placements = place_all(args, self.model.device)
        """Where movable work runs, and the reason."""
        for kind, placed in self.placements.items():
            logger.info("offload.%s: on the %s, %s", kind, placed.place, placed.reason)
        places = {kind: placed.place for kind, placed in self.placements.items()}
        optimizer, copies = (
            torch.device("cpu") if places[kind] == "cpu" else None
            for kind in (WorkKind.OPTIMIZER, WorkKind.CHECKPOINT)
        )
        self.shadow = ShadowAdapter(self.model, self._config, optimizer, copies)
        self.admission = SliceAdmission()
        self._slice_tokens = self._config.max_slice_tokens
        self._waiting: deque[dict[str, Any]] = deque()
        self._running: _RunningStep | None = None
        self.warm_up_slices: list[SliceTiming] = []
        """Every kind of slice, measured once before anything was served."""
        self.kept_free_bytes = 0
        """Free memory that is not for training: forward passes take it and give it back."""
        self._wanted_by = ""
        """What has run out of memory beside the step in progress, until that gives way; see `make_room`."""
        self._warm_up()

    def submit(self, task: dict[str, Any]) -> None:
        """Queue a task given as `FineTuneTask.to_wire()`. A malformed one is a failed result when its turn comes."""
        self._waiting.append(task)

    def abort(self, task_id: str) -> None:
        """Drop a task; parameters are as before it. Unknown ids are ignored."""
        self._waiting = deque(task for task in self._waiting if task.get("task_id") != task_id)
        if self._running is not None and self._running.task.task_id == task_id:
            self._running.step.discard()
            self._stop()

    def make_room(self, wanted_by: str) -> None:
        """Before the next slice, drop what the step in progress holds and start it again with smaller micro-batches.

        `wanted_by` is the error of the forward pass that found no memory.
        """
        self._wanted_by = wanted_by

    def set_slice_tokens(self, num_tokens: int) -> None:
        """Set the padded tokens of micro-batches of steps that start from now on; 0: as configured."""
        self._slice_tokens = min(num_tokens or self._config.max_slice_tokens, self._config.max_slice_tokens)

    def run(self, budget_s: float, min_slices: int, is_wanted: Callable[[], bool] = lambda: False) -> SliceReport:
        """Run slices for at most `budget_s` seconds, but at least `min_slices` if there is work that may run.

        The seconds begin when the device has done what it was given before.

        Beyond `min_slices` none starts once `is_wanted`: somebody waits for the device.

        An optimizer slice waits while the checkpoint of the step before is on its way to disk, so that a killed
        process loses one step at most. Nothing else waits for the disk.
        """
        report = SliceReport()
        if self._gives_way(report):
            return report
        if budget_s > 0 or min_slices > 0:
            started_s = settled_s(self.model.device)
            while (spec := self._next_slice(report)) is not None:
                left_s = budget_s - (time.perf_counter() - started_s)
                if self._waits_for_disk(spec):
                    if not report.slices:  # an idle engine would ask again and again
                        self.shadow.checkpoints.wait(min(max(0.0, left_s), _CHECKPOINT_WAIT_S))
                    break
                enough = len(report.slices) >= min_slices
                if enough and is_wanted():
                    break
                if enough and not self.admission.fits(spec.kind, spec.num_tokens, left_s, first=not report.slices):
                    break
                self._run_slice(spec, report)
                if report.out_of_memory:  # what failed has cost its time; smaller slices start with a new budget
                    break
        if (running := self._running) is not None:
            report.activation_bytes, report.step_tokens = running.step.activation_bytes, running.slice_tokens
        return report

    def run_step(self) -> SliceReport:
        """Run the step in progress, or the next one, to its end: the blocking baselines."""
        report = SliceReport()
        if self._gives_way(report):
            return report
        settled_s(self.model.device)
        while (spec := self._next_slice(report)) is not None and not report.finished:
            self._run_slice(spec, report)
            if self._running is not None and self._running.step.done:
                self._finish(self._running, report)
        return report

    def describe(self) -> dict[str, int]:
        """Bytes of base weights that the trainer uses, and how many of them are the inference engine's own."""
        weights = {p.data_ptr(): p.nbytes for p in self.model.causal_lm.parameters() if not p.requires_grad}
        shared = sum(size for pointer, size in weights.items() if pointer in self._shared_pointers)
        return {"base_weight_bytes": sum(weights.values()), "shared_bytes": shared}

    def measure_work(self, meter: EnergyMeter) -> Costs:
        """What movable work costs on either device; takes seconds.

        Empty on the CPU, where there is one device, and if the device has no memory for a second optimizer.
        """
        if self.model.device.type == "cpu":
            return {}
        flat = torch.cat([parameter.detach().flatten() for parameter in self.model.lora_parameters().values()])
        try:
            return measure_work(flat, self._args, meter)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("no memory is left to measure the optimizer in: %s", error)
            return {}

    def _waits_for_disk(self, spec: SliceSpec) -> bool:
        is_kept = self._running is not None and self._running.task.checkpoint is not None
        return spec.kind is SliceKind.OPTIMIZER and is_kept and self.shadow.checkpoints.is_behind()

    def _next_slice(self, report: SliceReport) -> SliceSpec | None:
        """The slice to run; on the way to it a finished step ends and waiting tasks start. None: no work is left."""
        while True:
            if self._running is not None:
                if (spec := self._running.step.next_slice) is not None:
                    return spec
                self._finish(self._running, report)
            if not self._waiting:
                return None
            self._start(self._waiting.popleft(), report)

    def _start(self, wire: dict[str, Any], report: SliceReport) -> None:
        task = FineTuneTask(str(wire.get("task_id")), TaskKind.EVALUATE, ())
        try:
            task = FineTuneTask.from_wire(wire)
            if task.on_live and task.kind is TaskKind.TRAIN:
                raise ConfigError("the live adapter is never trained in place")
            if not self._free_bytes():
                raise DeviceMemoryError("no memory is left for training; `mace doctor --plan` says what to change")
            step = self._new_step(task, self._slice_tokens)
        except Exception as error:  # noqa: BLE001 - any failure is the task's result; serving goes on
            self._fail(task, error, report)
            return
        if task.on_live:
            self.shadow.put_live_in()
        self._running = _RunningStep(task, step, self._slice_tokens, TaskResult(task.task_id, task.kind))

    def _new_step(self, task: FineTuneTask, slice_tokens: int) -> DpoStep:
        config = self._config.model_copy(update={"max_slice_tokens": slice_tokens})
        return DpoStep(self.model, self.shadow, task, config, share_prompt=self._share_prompt)

    def _finish(self, running: _RunningStep, report: SliceReport) -> None:
        result = running.result
        result.metrics, result.scores = running.step.result()
        self._stop()
        result.free_bytes = self._free_bytes()
        result.optimizer_steps = self.shadow.num_steps
        result.checkpoint_error = self.shadow.checkpoints.take_error()
        report.finished.append(result)

    def _stop(self) -> None:
        """Forget the running step, and put the shadow back if the live adapter stood in for it."""
        self.shadow.put_shadow_back()
        self._running = None

    def _run_slice(self, spec: SliceSpec, report: SliceReport) -> None:
        running = self._running
        assert running is not None  # whose slice it is
        started_s = time.perf_counter()
        shortage = ""
        try:
            running.step.run_slice()
            if spec.kind is SliceKind.OPTIMIZER and running.task.checkpoint is not None:
                self.shadow.keep(running.task.checkpoint)
        except DeviceMemoryError as error:
            shortage = str(error)  # the error itself holds, by its frames, all that the slice had allocated
        except Exception as error:  # noqa: BLE001 - any failure is the task's result; serving goes on
            self._stop()
            self._fail(running.task, error, report)
        if shortage:
            self._shrink(running, shortage, report)
        latency_s = settled_s(self.model.device) - started_s
        activation_bytes = running.step.activation_bytes
        cost = running.result
        cost.num_slices += 1
        cost.busy_s += latency_s
        cost.longest_slice_s = max(cost.longest_slice_s, latency_s)
        cost.peak_bytes = max(cost.peak_bytes, activation_bytes)
        report.peak_bytes = max(report.peak_bytes, activation_bytes)
        if not report.out_of_memory:  # such a slice did not do its work
            self.admission.observe(spec.kind, spec.num_tokens, latency_s)
            report.slices.append(SliceTiming(spec.kind, spec.num_tokens, latency_s))

    def _free_bytes(self) -> int:
        return max(0, free_memory_bytes(self.model.device) - self.kept_free_bytes)

    def _gives_way(self, report: SliceReport) -> bool:
        """Do what `make_room` asked for; False if it asked for nothing, or no step is in progress."""
        wanted_by, self._wanted_by = self._wanted_by, ""
        if not wanted_by or self._running is None:
            return False
        self._running.step.discard()
        self._start_again(self._running, f"a forward pass found no memory beside the step: {wanted_by}", report)
        return True

    def _shrink(self, running: _RunningStep, shortage: str, report: SliceReport) -> None:
        """Start a step again whose slice found no memory; a single pair cannot be halved, and fails."""
        if running.step.largest_batch_pairs > 1:
            self._start_again(running, shortage, report)
            return
        report.out_of_memory = True
        self._stop()
        release_cached_memory(self.model.device)
        self._fail(running.task, DeviceMemoryError(shortage), report)

    def _start_again(self, running: _RunningStep, shortage: str, report: SliceReport) -> None:
        """Start a discarded step again with micro-batches of half the size.

        No exception is being handled here: its frames would hold the memory that is to be released.
        """
        report.out_of_memory = True
        release_cached_memory(self.model.device)
        running.slice_tokens = max(1, min(running.slice_tokens, running.step.largest_batch_tokens) // 2)
        self._slice_tokens = min(self._slice_tokens, running.slice_tokens)
        logger.warning("%s; the step starts again with slices of %d tokens", shortage, running.slice_tokens)
        try:
            running.step = self._new_step(running.task, running.slice_tokens)
        except Exception as again:  # noqa: BLE001 - the device may be full of something else
            self._stop()
            self._fail(running.task, again, report)

    def _fail(self, task: FineTuneTask, error: Exception, report: SliceReport) -> None:
        """A task that did not end well has a result all the same."""
        logger.warning("fine-tune task %s failed: %s", task.task_id, error, exc_info=error)
        words = f"{type(error).__name__}: {error}"
        result = TaskResult(task.task_id, task.kind, error=words, free_bytes=self._free_bytes())
        result.checkpoint_error = self.shadow.checkpoints.take_error()
        report.finished.append(result)

    def _warm_up(self) -> None:
        """Run one step of a made-up pair, so that no kind of slice is unknown; leaves no trace in the adapter."""
        half = min(_WARM_UP_TOKENS, self._config.max_prompt_tokens, self._config.max_length_tokens // 2)
        pair = TokenizedPair("warm-up", (0,) * half, (0,) * half, (1,) * half)
        for _ in range(2):  # the first pass pays for lazy set-up inside torch
            self.admission = SliceAdmission()
            self.submit(FineTuneTask("warm-up", TaskKind.TRAIN, (pair,)).to_wire())
            report = self.run(float("inf"), sys.maxsize)
            result, self.warm_up_slices = report.finished[0], report.slices
            self.shadow.reset()
            if result.error is not None:
                logger.warning("warm-up step failed: %s", result.error)
