"""The fine-tune side of a simulated executor: tasks, the step in progress, and production's admission of slices.

What `engine.training.runner` and `engine.vllm.task_table` do, with the device's latency model in place of torch.
"""

from dataclasses import dataclass, field

from core.batch import Plan
from core.config import TrainingConfig
from core.dpo_slices import PairGroup, PairLengths, SliceSpec, StepModel, group_pairs, step_slices
from core.types import SliceKind, SliceTiming
from scheduler.iteration.slices import SliceAdmission
from scheduler.view import FineTuneState
from simulator.device import Device

_WARM_UP_TOKENS = 16
"""As in `engine.training.runner`: every kind of slice runs once, with a made-up pair, before anything is served."""


@dataclass(slots=True)
class Trained:
    """What slices did in one iteration."""

    slices: list[SliceTiming] = field(default_factory=list)
    busy_s: float = 0.0
    num_pairs: int = 0
    """Pairs of the steps that ended."""


class Trainer:
    """Tasks of equal pairs, in order of arrival. Each is one optimizer step on `training.pairs_per_step` pairs.

    `num_cached_pairs` of them have cached reference log-probabilities; with drift monitoring all have.
    """

    def __init__(
        self,
        *,
        device: Device,
        model: StepModel,
        pair: PairLengths,
        config: TrainingConfig,
        arena_bytes_per_token: float,
        has_backlog: bool,
        num_cached_pairs: int = 0,
        share_prompt: bool = True,
    ) -> None:
        self.warm_up: list[SliceTiming] = []
        self._device = device
        self._model = model
        self._pair = pair
        self._config = config
        self._arena_bytes_per_token = arena_bytes_per_token
        self._has_backlog = has_backlog
        self._num_cached_pairs = num_cached_pairs
        self._share_prompt = share_prompt
        self._admission = SliceAdmission()
        self._arrived_s: list[float] = []
        self._slice_tokens = config.max_slice_tokens
        self._step_tokens = 0
        """Of the step in progress, which keeps the size that it began with."""
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
    def held_bytes(self) -> int:
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
        """What the planner is told; None if there is no work."""
        if not self.has_work:
            return None
        arrived_s = self._arrived_s[0] if self._arrived_s else 0.0
        return FineTuneState(
            last_progress_s=max(arrived_s, self._last_progress_s),
            held_bytes=self.held_bytes,
            step_tokens=self._step_tokens,
            max_batch_tokens=PairGroup.of(self._pair, may_share=self._share_prompt).num_tokens,
        )

    def measure_all_kinds(self) -> None:
        """Measure as the worker does at its start; the timings are in `warm_up` for the planner."""
        half = min(_WARM_UP_TOKENS, self._config.max_prompt_tokens, self._config.max_length_tokens // 2)
        for work in self._slices([(half, half, half)], self._config.max_slice_tokens)[1]:
            timing = SliceTiming(work.kind, work.num_tokens, self._device.slice_s(work.kind, work.num_tokens, 0.0))
            self._admission.observe(timing.kind, timing.num_tokens, timing.latency_s)
            self.warm_up.append(timing)

    def run(self, plan: Plan, start_s: float) -> Trained:
        """Run the slices that the plan and its budget allow, from `start_s` on."""
        done = Trained()
        if not plan.is_blocking:
            limit = self._config.max_slice_tokens
            self._slice_tokens = min(plan.slice_tokens or limit, limit)
            if plan.finetune_budget_s <= 0 and plan.min_slices == 0:
                return done
        while self.has_work and not (plan.is_blocking and done.num_pairs):
            work = self._next_work()
            if not plan.is_blocking and not self._may_run(work, plan, done):
                break
            latency_s = self._device.slice_s(work.kind, work.num_tokens, start_s + done.busy_s)
            self._admission.observe(work.kind, work.num_tokens, latency_s)
            done.slices.append(SliceTiming(work.kind, work.num_tokens, latency_s))
            done.busy_s += latency_s
            self._advance(done)
        if done.slices:
            self._last_progress_s = start_s + done.busy_s
        return done

    def _may_run(self, work: SliceSpec, plan: Plan, done: Trained) -> bool:
        left_s = plan.finetune_budget_s - done.busy_s
        if len(done.slices) < plan.min_slices:
            return True
        return self._admission.fits(work.kind, work.num_tokens, left_s, first=not done.slices)

    def _next_work(self) -> SliceSpec:
        if not self._program:
            pairs = [self._pair] * self._config.pairs_per_step
            if self._slice_tokens not in self._programs:
                program = self._slices(pairs, self._slice_tokens, self._num_cached_pairs)
                self._programs[self._slice_tokens] = program
            self._groups, self._program = self._programs[self._slice_tokens]
            self._step_tokens = self._slice_tokens
        return self._program[self._next]

    def _slices(
        self, pairs: list[PairLengths], slice_tokens: int, num_cached: int = 0
    ) -> tuple[list[PairGroup], list[SliceSpec]]:
        is_cached = [number < num_cached for number in range(len(pairs))]
        groups = group_pairs(pairs, is_cached, slice_tokens, share_prompts=self._share_prompt)
        return groups, list(step_slices(groups, self._model))

    def _advance(self, done: Trained) -> None:
        self._next += 1
        if self._next == len(self._program):
            self._program, self._next, self._step_tokens = [], 0, 0
            done.num_pairs += self._config.pairs_per_step
            if self._arrived_s:
                self._arrived_s.pop(0)
