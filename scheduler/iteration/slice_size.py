"""How large the micro-batches of a fine-tune step are: as large as the usual slack and the arena hold.

A slice cannot be interrupted, so its size decides whether it fits beside inference at all; larger ones do more
work for each read of the weights. The choice is Algorithm 1 with one bin: memory is the arena, time the slack that
iterations with inference usually leave. It is made again when what was chosen passes the joint memory limit. An
out-of-memory halves the limit; many good steps raise it again.
"""

from collections import deque

from core.batch import IterationSample
from core.config import SchedulerConfig
from core.ports import LatencyPredictor
from core.types import SliceKind
from scheduler.memory.arena import ArenaModel
from scheduler.memory.ledger import MemoryLedger, Pool
from scheduler.packing import Bin, Demand, choose_candidate

_SMALLEST_TOKENS = 32
_WINDOW = 64
_USUAL_QUANTILE = 0.25
"""Of the recent budgets: a slice of the chosen size fits into three of four iterations that have slack."""
_REFRESH_EVERY = 16
"""Iterations between two choices; they matter only when a micro-batch starts."""
_GROW_AFTER = 256
"""Iterations with slices and without running out of memory, after which the limit doubles again."""

_LAYER_KINDS = frozenset({SliceKind.REFERENCE_LAYER, SliceKind.POLICY_LAYER, SliceKind.BACKWARD_LAYER})


class SliceSizer:
    """Chooses `Plan.slice_tokens`."""

    def __init__(
        self,
        config: SchedulerConfig,
        predictor: LatencyPredictor,
        memory: MemoryLedger,
        max_slice_tokens: int,
        arena: ArenaModel,
    ) -> None:
        self._config = config
        self._predictor = predictor
        self._memory = memory
        self._max_tokens = self._limit_tokens = max_slice_tokens
        self._arena = arena
        self._budgets: deque[float] = deque(maxlen=_WINDOW)
        self._chosen = 0
        self._age = 0
        self._good_iterations = 0

    def note_budget(self, budget_s: float) -> None:
        """Take in the budget of an iteration that also serves; zero (prefill took all) tells nothing."""
        if budget_s > 0:
            self._budgets.append(budget_s)

    def observe(self, sample: IterationSample) -> bool:
        """Learn what micro-batches hold, and from running out of memory. True when the limit is raised again."""
        if sample.out_of_memory:
            self._limit_tokens = max(_SMALLEST_TOKENS, self.tokens // 2)
            self._good_iterations = 0
            self._age = 0
            return False
        tokens = max((s.num_tokens for s in sample.slices if s.kind in _LAYER_KINDS), default=0)
        if not tokens:
            return False
        self._arena.observe(tokens, sample.peak_bytes)
        self._good_iterations += 1
        if self._good_iterations < _GROW_AFTER:
            return False
        self._good_iterations = 0
        self._limit_tokens = min(self._max_tokens, 2 * self._limit_tokens)
        return True

    def arena_bytes(self, num_tokens: int) -> int:
        """Predicted arena memory of a micro-batch."""
        return self._arena.predict(num_tokens)

    @property
    def tokens(self) -> int:
        """The size chosen last, or the limit before any choice."""
        return self._chosen or self._limit_tokens

    def choose(self, alone_budget_s: float | None) -> int:
        """Padded tokens of micro-batches that start from now on.

        Args:
            alone_budget_s: slack beside one decoding request, for an engine that has not served yet; None if not
                even that can be predicted.
        """
        if self._age % _REFRESH_EVERY == 0 or self.arena_bytes(self._chosen) > self.room_bytes:
            self._chosen = self._best(self._usual_budget_s(alone_budget_s))
            self._age = 0
        self._age += 1
        return self._chosen

    @property
    def room_bytes(self) -> int:
        """What a step may hold now: what the one in progress holds is given back before the next takes its own.

        Below zero if the KV cache alone passes the joint limit.
        """
        return min(self._memory.pool_capacity_bytes(Pool.ARENA), self.joint_room_bytes)

    @property
    def joint_room_bytes(self) -> int:
        """What the joint limit leaves of it, however large the arena is."""
        memory = self._memory
        return memory.capacity_bytes - (memory.used_bytes - memory.held_bytes(ARENA_OWNER))

    def _usual_budget_s(self, alone_budget_s: float | None) -> float | None:
        if not self._budgets:
            return alone_budget_s
        return sorted(self._budgets)[int(_USUAL_QUANTILE * len(self._budgets))]

    def _best(self, budget_s: float | None) -> int:
        if self._config.packing == "first_fit":
            return self._limit_tokens
        sizes = self._sizes()
        demands = [demand for demand in map(self._demand, sizes) if demand is not None]
        if budget_s is None or len(demands) < len(sizes):
            return sizes[-1]  # nothing known yet: the smallest delays least
        arena = Bin("arena", max(0, self.room_bytes), budget_s)
        chosen = choose_candidate(demands, arena, self._config)
        # Smaller slices come before dropping KV blocks: those are for the smallest (`IterationPlanner`).
        return sizes[-1] if chosen is None else sizes[chosen]

    def _sizes(self) -> list[int]:
        sizes = []
        size = self._limit_tokens
        while size > _SMALLEST_TOKENS:
            sizes.append(size)
            size //= 2
        return [*sizes, min(_SMALLEST_TOKENS, self._limit_tokens)]

    def _demand(self, num_tokens: int) -> Demand | None:
        kinds = (SliceKind.BACKWARD_LAYER, SliceKind.POLICY_LAYER)
        latencies = [self._predictor.slice_upper_s(kind, num_tokens) for kind in kinds]
        known = [latency for latency in latencies if latency is not None]
        return Demand(self.arena_bytes(num_tokens), max(known)) if len(known) == len(kinds) else None


ARENA_OWNER = "finetune-step"
"""Owner in the ledger of what the step in progress holds."""
