"""The fine-tune side of a simulated executor: tasks, the step in progress, and production's admission of slices.

What `engine.training.runner` and `engine.vllm.task_table` do, with the device's latency model in place of torch. The
slices of a step are data: what `engine.training.dpo.DpoStep` would run, in its order; a test compares the two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from core.batch import Plan
from core.model_dims import ModelDims
from core.pair_groups import PairShape, group_pairs
from core.types import SliceKind, SliceTiming
from scheduler.iteration.slices import SliceAdmission
from scheduler.view import FineTuneState
from simulator.device import Device
from simulator.hardware import Hardware
from simulator.trace import Trace

_MIN_CHUNK_TOKENS = 16
"""Least size of a head chunk, as in `engine.training.dpo`: a smaller one reads the head's weights all the same."""
_WARM_UP_TOKENS = 16
"""Length of the made-up pair with which every kind of slice runs once before anything is served, as in
`engine.training.runner`."""


@dataclass(frozen=True, slots=True)
class SliceWork:
    """One slice of a step."""

    kind: SliceKind
    num_tokens: int
    """Padded tokens for embedding and layers, completion tokens for head and loss, 0 for the optimizer."""
    batch_tokens: int
    """Padded tokens of the micro-batch that is in progress after it; 0 if none is."""


def step_slices(
    pairs: Sequence[PairShape],
    dims: ModelDims,
    slice_tokens: int,
    *,
    head_chunk_tokens: int,
    share_prompts: bool = True,
) -> list[SliceWork]:
    """List all slices of one training step on pairs without cached reference log-probabilities, in order.

    Args:
        pairs: the step's pairs, grouped by `core.pair_groups` as in the engine.
        dims: sizes of the model.
        slice_tokens: padded tokens that a micro-batch may have; a single pair may have more.
        head_chunk_tokens: completion tokens that the head takes at once, at most.
        share_prompts: `experiments.share_prompt`.
    """
    slices: list[SliceWork] = []
    for group in group_pairs(pairs, [False] * len(pairs), slice_tokens, share_prompts=share_prompts):
        num_targets = sum(pairs[i].num_targets for i in group.members)
        slices.extend(_micro_batch_slices(group.num_tokens, num_targets, dims, head_chunk_tokens))
    return [*slices, SliceWork(SliceKind.OPTIMIZER, 0, 0)]


def _micro_batch_slices(tokens: int, targets: int, dims: ModelDims, head_chunk_tokens: int) -> Iterator[SliceWork]:
    # With 152k words a head is nine layers: its chunks are cut until one is a layer's work.
    as_a_layer = tokens * dims.layer_weights // dims.head_weights
    chunk = min(head_chunk_tokens, max(as_a_layer, _MIN_CHUNK_TOKENS))
    for layer_kind, head_kind in (
        (SliceKind.REFERENCE_LAYER, SliceKind.REFERENCE_HEAD),
        (SliceKind.POLICY_LAYER, SliceKind.POLICY_HEAD),
    ):
        yield SliceWork(SliceKind.EMBED, tokens, tokens)
        for _ in range(dims.num_layers):
            yield SliceWork(layer_kind, tokens, tokens)
        for start in range(0, targets, chunk):
            yield SliceWork(head_kind, min(chunk, targets - start), tokens)
    yield SliceWork(SliceKind.LOSS, targets, tokens)
    for left in reversed(range(dims.num_layers)):
        yield SliceWork(SliceKind.BACKWARD_LAYER, tokens, tokens if left else 0)


@dataclass(slots=True)
class Trained:
    """Slices of one iteration."""

    slices: list[SliceTiming] = field(default_factory=list)
    busy_s: float = 0.0
    num_pairs: int = 0
    """Pairs of the steps that ended."""


class Trainer:
    """Tasks of equal pairs, in order of arrival. Each is one optimizer step on `training.pairs_per_step` pairs."""

    def __init__(self, trace: Trace, hardware: Hardware, device: Device) -> None:
        finetune, self._config = trace.finetune, trace.args.training
        self._device = device
        self._dims = hardware.dims
        self._pair = PairShape(finetune.prompt_tokens, finetune.completion_tokens, finetune.completion_tokens)
        self._arena_bytes_per_token = hardware.limits.arena_bytes_per_token
        self._has_backlog = self._config.enabled and finetune.pairs_per_s is None
        self._share_prompt = trace.args.experiments.share_prompt
        self._admission = SliceAdmission()
        self._arrived_s: list[float] = []
        self._slice_tokens = self._config.max_slice_tokens
        self._step_tokens = 0
        """Slice size of the step in progress, which keeps the size that it began with."""
        self._programs: dict[int, list[SliceWork]] = {}
        self._program: list[SliceWork] = []
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
        tokens = self._program[self._next - 1].batch_tokens if self._next else 0
        return int(tokens * self._arena_bytes_per_token)

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
            held_bytes=self.held_bytes,
            step_tokens=self._step_tokens,
            max_batch_tokens=self._pair.tokens(share_prompts=self._share_prompt),
        )

    def warm_up(self) -> list[SliceTiming]:
        """Measure every kind of slice as the worker does at its start; the planner learns from the timings."""
        half = min(_WARM_UP_TOKENS, self._config.max_prompt_tokens, self._config.max_length_tokens // 2)
        work = self._slices([PairShape(half, half, half)], self._config.max_slice_tokens)
        return [self._run_slice(one, 0.0) for one in work]

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
            timing = self._run_slice(work, start_s + done.busy_s)
            done.slices.append(timing)
            done.busy_s += timing.latency_s
            self._advance(done)
        if done.slices:
            self._last_progress_s = start_s + done.busy_s
        return done

    def _run_slice(self, work: SliceWork, start_s: float) -> SliceTiming:
        latency_s = self._device.slice_s(work.kind, work.num_tokens, start_s)
        self._admission.observe(work.kind, work.num_tokens, latency_s)
        return SliceTiming(work.kind, work.num_tokens, latency_s)

    def _may_run(self, work: SliceWork, plan: Plan, done: Trained) -> bool:
        left_s = plan.finetune_budget_s - done.busy_s
        if len(done.slices) < plan.min_slices:
            return True
        return self._admission.fits(work.kind, work.num_tokens, left_s, first=not done.slices)

    def _next_work(self) -> SliceWork:
        if not self._program:
            pairs = [self._pair] * self._config.pairs_per_step
            if self._slice_tokens not in self._programs:
                self._programs[self._slice_tokens] = self._slices(pairs, self._slice_tokens)
            self._program, self._step_tokens = self._programs[self._slice_tokens], self._slice_tokens
        return self._program[self._next]

    def _slices(self, pairs: list[PairShape], slice_tokens: int) -> list[SliceWork]:
        return step_slices(
            pairs,
            self._dims,
            slice_tokens,
            head_chunk_tokens=self._config.head_chunk_tokens,
            share_prompts=self._share_prompt,
        )

    def _advance(self, done: Trained) -> None:
        self._next += 1
        if self._next == len(self._program):
            self._program, self._next, self._step_tokens = [], 0, 0
            done.num_pairs += self._config.pairs_per_step
            if self._arrived_s:
                self._arrived_s.pop(0)
