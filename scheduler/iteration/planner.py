"""One engine iteration: what the forward pass may take, and what is left for fine-tune slices.

`plan` is asked before inference is scheduled, `settle` after, for what was really scheduled (prefix hits, finished
and preempted requests make a difference). Tasks are taken in order of priority; decoding is mandatory and counts
first. Prefill chunks are packed by best fit into the iteration's capacity (`scheduler.iteration.prefill`); slices get
the rest of it, within the slack before the TTFT targets. One bin is open at a time: a second would let a task wait for
a tighter fit in an iteration that is planned anew anyway. When memory is short, `scheduler.memory.relief` says what
gives way; KV blocks are dropped before inference is scheduled, so `plan` decides that for the slices as well.

Pure: no clock, no device. The engine and the simulator run this same code.
"""

from dataclasses import dataclass

from core.batch import ForwardShape, IterationSample
from core.config import KvPruningConfig, SchedulerConfig, SloConfig
from core.ports import LatencyPredictor
from core.types import SliceKind
from scheduler.iteration.prefill import PrefillPacker
from scheduler.iteration.retrain import RetrainMeter
from scheduler.iteration.slice_size import ARENA_OWNER, SliceSizer
from scheduler.iteration.slo_budget import iteration_capacity_s, ttft_slack_s
from scheduler.memory.arena import ArenaModel
from scheduler.memory.arena_need import ArenaNeed, ModelDims
from scheduler.memory.ledger import MemoryLedger, Pool
from scheduler.memory.relief import BlockBudget, MemoryRelief
from scheduler.packing import Bin
from scheduler.plan import FineTuneState, IterationView, Plan
from scheduler.priority import decode_priority, finetune_priority, prefill_priority

IDLE_QUANTUM_S = 0.01
"""With nothing to serve, slices run for this long (at least one) before new requests are looked for."""

_KV_OWNER = "inference"
"""Owner in the ledger of the KV blocks that vLLM has given out."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine can do at most, whatever the plan says."""

    max_tokens: int
    """Tokens of one forward pass."""
    max_slice_tokens: int
    """Padded tokens of one fine-tune micro-batch."""
    kv_bytes_per_token: float = 0.0
    arena_bytes_per_token: float = 0.0
    """Of a micro-batch, from the profile; 0 if unknown (learnt from the first steps)."""
    arena_fixed_bytes: float = 0.0
    """What a step holds whatever its micro-batches."""
    can_chunk_prefills: bool = True
    """False: a prompt is computed in one pass, so its tokens may not be limited."""
    dims: ModelDims | None = None
    """Of the model in training: predicts a step's memory where no profile does. None: learnt from the first steps."""


class IterationPlanner:
    """Turns SLOs, priorities and predictions into each iteration's plan."""

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        slo: SloConfig,
        predictor: LatencyPredictor,
        limits: EngineLimits,
        memory: MemoryLedger,
        pruning: KvPruningConfig | None = None,
    ) -> None:
        """`pruning`: None if KV blocks are not dropped."""
        self.memory = memory
        self.predictor = predictor
        self.retrain = RetrainMeter(config)
        self._config = config
        self._slo = slo
        self._limits = limits
        need = None if limits.dims is None else ArenaNeed(limits.dims)
        arena = ArenaModel(limits.arena_fixed_bytes, limits.arena_bytes_per_token, need)
        self._sizer = SliceSizer(config, predictor, memory, limits.max_slice_tokens, arena)
        self._relief = MemoryRelief(pruning, memory, limits.kv_bytes_per_token)
        self._packer = PrefillPacker(
            config, predictor, max_tokens=limits.max_tokens, kv_bytes_per_token=limits.kv_bytes_per_token
        )
        self._full_arena_bytes = 0
        """Before slices ran out of it."""

    def may_run(self, state: FineTuneState | None) -> bool:
        """Whether slices could run if nothing was to be served now. Scoring a candidate is held back by no rate."""
        if state is None or self._config.policy == "inference_only":
            return False
        return not state.is_training or self.retrain.may_train()

    def plan(self, view: IterationView) -> Plan:
        """Token budget, chunk cap and KV blocks to drop, or a blocking training phase of a baseline.

        Raises:
            LedgerError: `view.used_kv_bytes` is more than the KV cache has.
        """
        self.memory.record(_KV_OWNER, Pool.KV, view.used_kv_bytes)
        if self._is_blocking_due(view.finetune, view.now_s):
            return Plan(0, 0, finetune_budget_s=float("inf"), min_slices=1, is_blocking=True)
        blocks = self._relief.open(view)
        shape = ForwardShape(num_decode=view.num_decode, decode_context=view.decode_context)
        plan = self._plan_forward(view, shape, blocks)
        if view.finetune is not None and self._may_train(view.finetune):
            plan.slice_tokens = self._slice_tokens(view)
            self._prune_for_slices(plan, view, view.finetune, shape, blocks)
        self._relief.close(blocks, view, plan, _KV_OWNER)
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
        self._sizer.note_budget(plan.finetune_budget_s)
        plan.min_slices = int(must_train)
        return plan

    def observe(self, sample: IterationSample) -> None:
        """Feed back one measured iteration."""
        self.predictor.observe(sample)
        has_grown = self._sizer.observe(sample)
        arena_bytes = self.memory.pool_capacity_bytes(Pool.ARENA)
        if sample.out_of_memory:
            # No larger than what did not fit, as far as that is known.
            self._full_arena_bytes = max(self._full_arena_bytes, arena_bytes)
            wanted = max(self.memory.held_bytes(ARENA_OWNER), sample.peak_bytes)
            if wanted:
                self.memory.shrink(Pool.ARENA, wanted)
        elif has_grown and arena_bytes < self._full_arena_bytes:
            self.memory.set_capacity(Pool.ARENA, min(2 * arena_bytes, self._full_arena_bytes))

    def note_requests(self, count: int = 1) -> None:
        """Count arrived inference requests."""
        self.retrain.note_requests(count)

    def note_trained(self, num_pairs: int) -> None:
        """Count pairs of finished optimizer steps."""
        self.retrain.note_trained(num_pairs)

    def release_arena(self) -> None:
        """No step is in progress any more."""
        self.memory.release(ARENA_OWNER)

    def _plan_forward(self, view: IterationView, shape: ForwardShape, blocks: BlockBudget) -> Plan:
        """What inference may take; chunks are added to `shape`, which holds what decodes."""
        if not view.prefills or not self._limits.can_chunk_prefills:
            return Plan(self._limits.max_tokens, 0)
        decode_s = self.predictor.forward_upper_s(shape)
        if decode_s is None:  # nothing known of this device: vLLM's own way
            return Plan(self._limits.max_tokens, 0)
        capacity_s = iteration_capacity_s(self._slo, self._config.slack_fraction, view.num_decode)
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
        after_bytes = self._sizer.joint_room_bytes - int(blocks.growth_bytes)
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
        slack_s = iteration_capacity_s(self._slo, self._config.slack_fraction, view.num_decode) - busy_s
        # A prefix hit or a short last chunk computes less than later iterations may.
        tokens_each = max(shape.num_prefill_tokens, plan.token_budget - shape.num_decode)
        is_stuck = shape.num_prefill_tokens == 0
        first_token_s = ttft_slack_s(view, self._slo, busy_s, 0 if is_stuck else tokens_each)
        if first_token_s is not None:
            slack_s = min(slack_s, self._config.slack_fraction * first_token_s)
        return slack_s

    def _slice_tokens(self, view: IterationView) -> int:
        lone = ForwardShape(num_decode=1, decode_context=max(1, view.decode_context // max(1, view.num_decode)))
        lone_s = self.predictor.forward_upper_s(lone)
        capacity_s = iteration_capacity_s(self._slo, self._config.slack_fraction, 1)
        alone_s = None if lone_s is None else capacity_s - self.predictor.overhead_s - lone_s
        return self._sizer.choose(alone_s)

    def _reserve_arena(self, state: FineTuneState, slice_tokens: int, *, is_urgent: bool) -> bool:
        """False: with the KV cache this full, the step would pass `tau_mem`.

        Urgent work (it has waited too long, or nobody else wants the device) may: the arena is memory of its own.
        A pair larger than the whole arena is tried anyway, and fails with a name if the device agrees.
        """
        wanted = self._arena_bytes(state, slice_tokens)
        if self.memory.reserve(ARENA_OWNER, Pool.ARENA, wanted):
            return True
        if is_urgent:
            self.memory.record(ARENA_OWNER, Pool.ARENA, wanted)
        return is_urgent

    def _arena_bytes(self, state: FineTuneState, slice_tokens: int) -> int:
        """What the step may hold, within the arena."""
        num_tokens = max(slice_tokens, state.step_tokens, state.max_batch_tokens)
        wanted = max(self._sizer.arena_bytes(num_tokens), state.held_bytes)
        return min(wanted, self.memory.pool_capacity_bytes(Pool.ARENA))

    def _is_blocking_due(self, state: FineTuneState | None, now_s: float) -> bool:
        """A baseline stops inference for a step; scoring a candidate is one as well, and is never put off."""
        if state is not None and not state.is_training and self.retrain.is_blocking_policy:
            return True
        return self.retrain.is_blocking_due(state is not None, now_s)

    def _may_train(self, state: FineTuneState) -> bool:
        """Whether slices may run beside inference."""
        return self._config.policy == "mace" and self.may_run(state)

    def _must_train(self, view: IterationView, state: FineTuneState) -> bool:
        """Whether a slice runs even without slack: below the rate's floor, or it has waited above all others."""
        if self.retrain.is_below_floor():
            return True
        return self._finetune_priority(view, state) > max(
            decode_priority(0.0, self._config) if view.num_decode else float("-inf"),
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
        wait_s = view.now_s - state.last_progress_s
        return finetune_priority(wait_s, state.dpo_loss, state.attempts, self._config, state.gamma)

    def _top_prefill_priority(self, view: IterationView) -> float:
        return max(
            (prefill_priority(view.now_s - p.arrived_s, p.user_priority, self._config) for p in view.prefills),
            default=float("-inf"),
        )
