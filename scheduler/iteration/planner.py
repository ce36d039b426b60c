"""One engine iteration: what the forward pass may take, and what is left for fine-tune slices.

`plan` is asked before inference is scheduled, `settle` after, for what was really scheduled (prefix hits, finished
and preempted requests make a difference). Tasks are taken in order of priority; decoding is mandatory and counts
first. Prefill chunks are packed by best fit into the iteration's capacity (`scheduler.iteration.prefill`); slices get
the rest of it, within the slack before the TTFT targets, and little while a prompt is computed; what clients see beyond
the engine corrects both (`scheduler.iteration.edge`). One bin is open at a time: a second would let a task wait for
a tighter fit in an iteration that is planned anew anyway. When memory is short, `scheduler.memory.relief` says what
gives way; KV blocks are dropped before inference is scheduled, so `plan` decides that for the slices as well.

Pure: no clock, no device. The engine and the simulator run this same code, and build it from the same settings and
`EngineLimits`.
"""

from dataclasses import dataclass

from core.batch import EdgeReport, ForwardShape, IterationSample, Plan
from core.config import AppArgs, SloConfig
from core.dpo_slices import HEAD_CHUNK_TOKENS
from core.model_dims import ModelDims
from core.ports import LatencyPredictor
from core.types import SliceKind
from scheduler.iteration.edge import EdgeController
from scheduler.iteration.prefill import PrefillPacker
from scheduler.iteration.retrain import RetrainMeter
from scheduler.iteration.slices import SliceSizer
from scheduler.iteration.slo import TYPICAL_PROMPT, iteration_capacity_s, ttft_slack_s
from scheduler.memory.arena import ArenaModel, ArenaNeed
from scheduler.memory.ledger import MemoryLedger, Pool
from scheduler.memory.relief import BlockBudget, MemoryRelief
from scheduler.packing import Bin
from scheduler.priority import decode_priority, finetune_priority, prefill_priority
from scheduler.view import FineTuneState, IterationView

IDLE_QUANTUM_S = 0.01
"""Slices of an idle engine run for this long (at least one) before new requests are looked for."""
NEWCOMER_SHARE = 0.2
"""While somebody waits for a first token, slices take at most this share of an iteration's own time, so that training
adds no more than a fifth to a request's time to its first token, beside the slice that runs when it comes."""
_MOST_PROMPT_CORRECTION = 0.5
"""Share of an iteration's capacity that prompts lose at most to what clients see: they must go on."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Abilities of the device and the engine that the settings do not say."""

    max_tokens: int
    """Tokens of one forward pass."""
    kv_bytes: int
    """Size of the KV cache."""
    arena_bytes: int = 0
    """Size of the fine-tune arena if `training.arena_bytes` does not say it; 0 until the worker knows what is free."""
    kv_bytes_per_token: float = 0.0
    arena_fixed_bytes: float = 0.0
    """Memory that a step holds whatever its micro-batches, from the profile."""
    arena_bytes_per_token: float = 0.0
    """Memory that it holds for each padded token of a micro-batch, from the profile; 0 if unknown."""
    dims: ModelDims | None = None
    """Sizes of the trained model, which predict a step's memory where no profile does; None: its first steps tell."""
    can_chunk_prefills: bool = True
    """False: a prompt is computed in one pass, so its tokens may not be limited."""
    can_prune: bool = True
    """False: KV blocks are not dropped, whatever `kv_pruning` says."""


class IterationPlanner:
    """Turns SLOs, priorities and predictions into each iteration's plan."""

    def __init__(self, args: AppArgs, predictor: LatencyPredictor, limits: EngineLimits) -> None:
        self.memory = MemoryLedger(
            kv_bytes=limits.kv_bytes,
            arena_bytes=args.training.arena_bytes or limits.arena_bytes,
            tau_mem=args.scheduler.tau_mem,
        )
        self.predictor = predictor
        self.retrain = RetrainMeter(args)
        """Tell it of arrived requests and of trained pairs."""
        self._config, self._experiments = args.scheduler, args.experiments
        self._edge = EdgeController(args.slo, args.scheduler.slack_fraction)
        self._limits = limits
        need = ArenaNeed(limits.dims, args.lora.rank, HEAD_CHUNK_TOKENS) if limits.dims else None
        self._arena = ArenaModel(limits.arena_fixed_bytes, limits.arena_bytes_per_token, need)
        max_slice_tokens = args.training.max_slice_tokens
        self._sizer = SliceSizer(args.experiments, predictor, self.memory, max_slice_tokens, self._arena)
        pruning = args.kv_pruning if limits.can_prune else None
        self._relief = MemoryRelief(pruning, self.memory, limits.kv_bytes_per_token)
        self._packer = PrefillPacker(
            args.experiments,
            predictor,
            max_tokens=limits.max_tokens,
            kv_bytes_per_token=limits.kv_bytes_per_token,
        )
        self._full_arena_bytes = 0
        """Before slices ran out of it."""

    @property
    def _slo(self) -> SloConfig:
        return self._edge.slo

    def set_slo(self, slo: SloConfig) -> None:
        """Plan for other targets from the next iteration on."""
        self._edge.slo = slo

    def observe_edge(self, report: EdgeReport, now_s: float) -> None:
        """Take in what clients saw since the last report; `now_s` is on the clock of `IterationView.now_s`."""
        self._edge.observe(report, now_s)

    def may_run(self, state: FineTuneState | None) -> bool:
        """True if slices could run with nothing to serve now. No rate delays the scoring of a candidate."""
        if state is None or self._config.policy == "inference_only":
            return False
        return not state.is_training or self.retrain.may_train()

    def plan(self, view: IterationView) -> Plan:
        """Token budget, chunk cap and KV blocks to drop, or a blocking training phase of a baseline.

        Raises:
            LedgerError: `view.used_kv_bytes` is more than the KV cache has.
        """
        is_blocking = self._is_blocking_due(view.finetune, view.now_s)
        view, dropped = (view, 0) if is_blocking else self._relief.drop_at_once(view)
        self.memory.record(Pool.KV, view.used_kv_bytes)
        if is_blocking:
            return Plan(finetune_budget_s=float("inf"), min_slices=1, is_blocking=True)
        blocks = self._relief.open(view)
        shape = ForwardShape(num_decode=view.num_decode, decode_context=view.decode_context)
        correction_s = self._edge.gap_correction_s(view.now_s)
        plan = self._plan_forward(view, shape, blocks, correction_s)
        plan.gap_correction_s = correction_s
        plan.first_token_share = self._edge.first_token_share(view.now_s)
        if view.finetune is not None and self._may_train(view.finetune):
            plan.slice_tokens = self._slice_tokens(view)
            self._prune_for_slices(plan, view, view.finetune, shape, blocks)
        self._relief.close(blocks, view, plan)
        if dropped:
            plan.prune_blocks, plan.prune_reason = dropped, "always"
        return plan

    def settle(self, plan: Plan, view: IterationView, shape: ForwardShape) -> Plan:
        """Complete the plan with its fine-tune part, for the forward pass `shape` that was scheduled under it."""
        plan.predicted_forward_s = predicted_s = self.predictor.forward_s(shape) if shape.num_tokens else 0.0
        state = view.finetune
        if plan.is_blocking or state is None or not self._may_train(state):
            return plan
        must_train = self._must_train(view, state)
        is_urgent = must_train or shape.num_tokens == 0
        if plan.defers_training and not is_urgent:
            return plan
        if not self._reserve_arena(state, plan.slice_tokens, is_urgent=is_urgent):
            return plan  # no memory: training waits
        plan.reserves_arena = True
        if shape.num_tokens == 0:
            plan.finetune_budget_s, plan.min_slices = IDLE_QUANTUM_S, 1
            return plan
        upper_s = self.predictor.forward_upper_s(shape)
        if predicted_s is None or upper_s is None:  # measure the forward pass alone first
            return plan
        plan.finetune_budget_s = max(0.0, self._slack_s(plan, view, shape, upper_s))
        if not _has_newcomers(view, shape):  # what they leave is no measure of the slack
            self._sizer.note_budget(plan.finetune_budget_s)
        plan.min_slices = int(must_train)
        return plan

    def observe(self, sample: IterationSample) -> None:
        """Feed back one measured iteration."""
        self.predictor.observe(sample)
        self._edge.note_iteration(sample)
        has_grown = self._sizer.observe(sample)
        arena_bytes = self.memory.pool_capacity_bytes(Pool.ARENA)
        if sample.report.out_of_memory:
            # No larger than what did not fit, as far as that is known.
            self._full_arena_bytes = max(self._full_arena_bytes, arena_bytes)
            wanted = max(self.memory.pool_used_bytes(Pool.ARENA), sample.report.peak_bytes)
            if wanted:
                self.memory.set_capacity(Pool.ARENA, min(arena_bytes, wanted))
        elif has_grown and arena_bytes < self._full_arena_bytes:
            self.memory.set_capacity(Pool.ARENA, min(2 * arena_bytes, self._full_arena_bytes))

    def _plan_forward(
        self, view: IterationView, shape: ForwardShape, blocks: BlockBudget, correction_s: float
    ) -> Plan:
        """The plan for inference; chunks are added to `shape`, which holds what decodes."""
        if not view.prefills or not self._limits.can_chunk_prefills:
            return Plan(self._limits.max_tokens)
        decode_s = self.predictor.forward_upper_s(shape)
        if decode_s is None:  # nothing known of this device: vLLM's own way
            return Plan(self._limits.max_tokens)
        slack_fraction = self._config.slack_fraction
        correction_s = min(correction_s, _MOST_PROMPT_CORRECTION * slack_fraction * self._slo.tbt_s)
        capacity_s = iteration_capacity_s(self._slo, slack_fraction, view.num_decode, correction_s)
        now = Bin(
            "now",
            float(self.memory.capacity_bytes),
            capacity_s - self.predictor.overhead_s - self._aged_slice_s(view),
            float(self.memory.used_bytes) + blocks.growth_bytes,
            decode_s,
        )
        chunks = self._packer.pack(view, shape, now, blocks)
        budget = min(self._limits.max_tokens, max(view.num_decode, view.decode_tokens) + sum(chunks))
        return Plan(budget, max(chunks, default=0))

    def _prune_for_slices(
        self, plan: Plan, view: IterationView, state: FineTuneState, shape: ForwardShape, blocks: BlockBudget
    ) -> None:
        """Drop KV blocks for slices that have the time, but pass the joint limit even at the size chosen."""
        if blocks.is_short or not blocks.droppable_blocks:
            return
        after_bytes = self.memory.joint_room_bytes(Pool.ARENA) - int(blocks.growth_bytes)
        missing = self._arena_bytes(state, plan.slice_tokens) - after_bytes
        if missing <= 0:
            return
        upper_s = self.predictor.forward_upper_s(shape)
        has_time = upper_s is not None and self._slack_s(plan, view, shape, upper_s) > 0
        quote = blocks.quote(0, missing)
        if quote is not None and (has_time or self._must_train(view, state)):
            blocks.take(0, quote, "finetune")

    def _slack_s(self, plan: Plan, view: IterationView, shape: ForwardShape, upper_s: float) -> float:
        busy_s = upper_s + self.predictor.overhead_s
        slack_fraction = self._config.slack_fraction
        slack_s = iteration_capacity_s(self._slo, slack_fraction, view.num_decode, plan.gap_correction_s) - busy_s
        if _has_newcomers(view, shape):
            slack_s = min(slack_s, NEWCOMER_SHARE * busy_s)
        # A prefix hit or a short last chunk computes less than later iterations may.
        tokens_each = max(shape.num_prefill_tokens, plan.token_budget - shape.num_decode)
        is_stuck = shape.num_prefill_tokens == 0
        first_token_s = ttft_slack_s(view, self._slo, busy_s, 0 if is_stuck else tokens_each)
        if first_token_s is not None:
            slack_s = min(slack_s, slack_fraction * first_token_s)
        return slack_s * plan.first_token_share

    def _slice_tokens(self, view: IterationView) -> int:
        lone = ForwardShape(num_decode=1, decode_context=max(1, view.decode_context // max(1, view.num_decode)))
        lone_s = self.predictor.forward_upper_s(lone)
        capacity_s = iteration_capacity_s(self._slo, self._config.slack_fraction, 1)
        alone_s = None if lone_s is None else capacity_s - self.predictor.overhead_s - lone_s
        prompt_s = self.predictor.forward_upper_s(ForwardShape().with_chunk(TYPICAL_PROMPT, 0))
        return self._sizer.choose(alone_s, max(IDLE_QUANTUM_S, prompt_s or 0.0))

    def _reserve_arena(self, state: FineTuneState, slice_tokens: int, *, is_urgent: bool) -> bool:
        """False: with the KV cache this full, the step would pass `tau_mem`.

        Urgent work (it has waited too long, or nobody else wants the device) may: the arena is memory of its own.
        A pair larger than the whole arena is tried anyway, and fails with a name if the device agrees.
        """
        wanted = self._arena_bytes(state, slice_tokens)
        if self.memory.reserve(Pool.ARENA, wanted):
            return True
        if is_urgent:
            self.memory.record(Pool.ARENA, wanted)
        return is_urgent

    def _arena_bytes(self, state: FineTuneState, slice_tokens: int) -> int:
        """Memory that the step may hold, within the arena."""
        num_tokens = max(slice_tokens, state.step_tokens, state.max_batch_tokens)
        wanted = max(self._arena.predict(num_tokens), state.activation_bytes)
        return min(wanted, self.memory.pool_capacity_bytes(Pool.ARENA))

    def _is_blocking_due(self, state: FineTuneState | None, now_s: float) -> bool:
        """A baseline stops inference for a step; scoring a candidate is one as well, and is never put off."""
        if state is not None and not state.is_training and self.retrain.is_blocking_policy:
            return True
        return self.retrain.is_blocking_due(state is not None, now_s)

    def _may_train(self, state: FineTuneState) -> bool:
        """True if slices may run beside inference."""
        return self._config.policy == "mace" and self.may_run(state)

    def _must_train(self, view: IterationView, state: FineTuneState) -> bool:
        """True if a slice runs even without slack: below the rate's floor, or it has waited above all others."""
        if self.retrain.is_below_floor():
            return True
        return self._finetune_priority(view, state) > max(
            decode_priority(0.0, self._experiments) if view.num_decode else float("-inf"),
            self._top_prefill_priority(view),
        )

    def _aged_slice_s(self, view: IterationView) -> float:
        """Time kept for one slice if fine-tuning stands before the prefills in the order of priority."""
        state = view.finetune
        if state is None or not self._may_train(state):
            return 0.0
        if self._finetune_priority(view, state) <= self._top_prefill_priority(view):
            return 0.0
        return self.predictor.slice_upper_s(SliceKind.BACKWARD_LAYER, self._sizer.tokens) or 0.0

    def _finetune_priority(self, view: IterationView, state: FineTuneState) -> float:
        gamma = self._config.gamma if state.gamma is None else state.gamma
        wait_s = view.now_s - state.last_progress_s
        return finetune_priority(wait_s, state.dpo_loss, state.attempts, gamma, self._experiments)

    def _top_prefill_priority(self, view: IterationView) -> float:
        return max(
            (
                prefill_priority(view.now_s - p.arrived_s, p.user_priority, self._experiments)
                for p in view.prefills
            ),
            default=float("-inf"),
        )


def _has_newcomers(view: IterationView, shape: ForwardShape) -> bool:
    """True if somebody waits for a first token, in this forward pass or in the queue."""
    return bool(view.prefills or shape.num_prefill_tokens)
