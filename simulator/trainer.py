"""The fine-tune side of a simulated executor: tasks, the step in progress, and production's admission of slices.

What `engine.training.runner` and `engine.vllm.task_table` do, with the device's latency model in place of torch. The
slices of a step are data: what `engine.training.dpo.DpoStep` would run, in its order; a test compares the two.
"""

from dataclasses import dataclass, field

from core.batch import Plan
from core.dpo_slices import PairGroup, PairLengths, SliceSpec, group_pairs, step_slices
from core.offload import WorkKind
from core.types import SliceKind, SliceTiming
from scheduler.iteration.slices import SliceAdmission
from scheduler.view import FineTuneState
from simulator.device import Device
from simulator.hardware import Hardware
from simulator.power import place_optimizer
from simulator.trace import Trace

_WARM_UP_TOKENS = 16
"""Length of the made-up pair with which every kind of slice runs once before anything is served, as in
`engine.training.runner`."""


@dataclass(slots=True)
class Trained:
    """Slices of one iteration."""

    slices: list[SliceTiming] = field(default_factory=list)
    busy_s: float = 0.0
    moved_s: float = 0.0
    """Of that, what the CPU ran beside the engine's device."""
    num_pairs: int = 0
    """Pairs of the steps that ended."""


class Trainer:
    """Tasks of equal pairs, in order of arrival. Each is one optimizer step on `training.pairs_per_step` pairs."""

    def __init__(self, trace: Trace, hardware: Hardware, device: Device) -> None:
        finetune, self._config = trace.finetune, trace.args.training
        self._device = device
        self._dims = hardware.dims
        self._pair = (finetune.prompt_tokens, finetune.completion_tokens, finetune.completion_tokens)
        self._arena_bytes_per_token = hardware.limits.arena_bytes_per_token
        self._has_backlog = self._config.enabled and finetune.pairs_per_s is None
        self._share_prompt = trace.args.experiments.share_prompt
        self._admission = SliceAdmission()
        self._moved: float | None = None
        """How many times as long AdamW takes on the CPU, if it runs there."""
        if place_optimizer(trace.power, hardware.profile, trace.args).place == "cpu":
            costs = hardware.profile.work.get(WorkKind.OPTIMIZER, {})
            self._moved = costs["cpu"].seconds / costs["engine"].seconds
        self._arrived_s: list[float] = []
        self._slice_tokens = self._config.max_slice_tokens
        self._step_tokens = 0
        """Slice size of the step in progress, which keeps the size that it began with."""
        self._programs: dict[int, tuple[list[PairGroup], list[SliceSpec]]] = {}
        self._groups: list[PairGroup] = []
        self._program: list[SliceSpec] = []
        self._next = 0
        self._last_progress_s = 0.0

    @property
    def has_work(self) -> bool:
        """A task is waiting or in progress."""
        return self._has_backlog or bool(self._arrived_s)

    @property
    def num_tasks(self) -> int:
        """Tasks in progress and waiting; a backlog that never empties counts as one."""
        return len(self._arrived_s) + self._has_backlog

    @property
    def activation_bytes(self) -> int:
        """Arena memory of the step in progress."""
        if self._next == 0:
            return 0
        last = self._program[self._next - 1]
        is_over = last.kind is SliceKind.BACKWARD_LAYER and last.part == 0
        return 0 if is_over else int(self._groups[last.group].num_tokens * self._arena_bytes_per_token)

    def add_task(self, now_s: float) -> None:
        """Take in one more task."""
        self._arrived_s.append(now_s)

    def state(self) -> FineTuneState | None:
        """Describe the work to the planner; None if there is none."""
        if not self.has_work:
            return None
        arrived_s = self._arrived_s[0] if self._arrived_s else 0.0
        return FineTuneState(
            last_progress_s=max(arrived_s, self._last_progress_s),
            activation_bytes=self.activation_bytes,
            step_tokens=self._step_tokens,
            max_batch_tokens=PairGroup((self._pair,), may_share=self._share_prompt).num_tokens,
        )

    def warm_up(self) -> list[SliceTiming]:
        """Measure every kind of slice as the worker does at its start; the planner learns from the timings."""
        half = min(_WARM_UP_TOKENS, self._config.max_prompt_tokens, self._config.max_length_tokens // 2)
        _, work = self._slices([(half, half, half)], self._config.max_slice_tokens)
        return [self._run_slice(one, 0.0) for one in work]

    def run(self, plan: Plan, start_s: float, wanted_s: float) -> Trained:
        """Run the slices that the plan and its budget allow, from `start_s` on; `wanted_s` is when a request comes."""
        done = Trained()
        if not plan.is_blocking:
            limit = self._config.max_slice_tokens
            self._slice_tokens = min(plan.slice_tokens or limit, limit)
            if plan.finetune_budget_s <= 0 and plan.min_slices == 0:
                return done
        while self.has_work and not (plan.is_blocking and done.num_pairs):
            work = self._next_work()
            if not plan.is_blocking and not self._may_run(work, plan, done, wanted_s - start_s):
                break
            timing = self._run_slice(work, start_s + done.busy_s)
            done.slices.append(timing)
            done.busy_s += timing.latency_s
            if self._is_moved(work):
                done.moved_s += timing.latency_s
            self._advance(done)
        if done.slices:
            self._last_progress_s = start_s + done.busy_s
        return done

    def _run_slice(self, work: SliceSpec, start_s: float) -> SliceTiming:
        latency_s = self._device.slice_s(work.kind, work.num_tokens, start_s)
        if self._is_moved(work):
            latency_s *= self._moved or 1.0
        self._admission.observe(work.kind, work.num_tokens, latency_s)
        return SliceTiming(work.kind, work.num_tokens, latency_s)

    def _is_moved(self, work: SliceSpec) -> bool:
        return self._moved is not None and work.kind is SliceKind.OPTIMIZER

    def _may_run(self, work: SliceSpec, plan: Plan, done: Trained, wanted_in_s: float) -> bool:
        left_s = plan.finetune_budget_s - done.busy_s
        if len(done.slices) < plan.min_slices:
            return True
        if done.busy_s >= wanted_in_s:
            return False
        return self._admission.fits(work.kind, work.num_tokens, left_s, first=not done.slices)

    def _next_work(self) -> SliceSpec:
        if not self._program:
            pairs = [self._pair] * self._config.pairs_per_step
            if self._slice_tokens not in self._programs:
                self._programs[self._slice_tokens] = self._slices(pairs, self._slice_tokens)
            self._groups, self._program = self._programs[self._slice_tokens]
            self._step_tokens = self._slice_tokens
        return self._program[self._next]

    def _slices(self, pairs: list[PairLengths], slice_tokens: int) -> tuple[list[PairGroup], list[SliceSpec]]:
        """Group pairs without cached reference log-probabilities into micro-batches, and list the slices of a step."""
        groups = group_pairs(pairs, [False] * len(pairs), slice_tokens, share_prompts=self._share_prompt)
        return groups, list(step_slices(groups, self._dims))

    def _advance(self, done: Trained) -> None:
        self._next += 1
        if self._next == len(self._program):
            self._program, self._next, self._step_tokens = [], 0, 0
            done.num_pairs += self._config.pairs_per_step
            if self._arrived_s:
                self._arrived_s.pop(0)
