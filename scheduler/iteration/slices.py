"""Fine-tune slices: how large they are (the planner's side), and whether one may start (the worker's last word).

A slice cannot be interrupted, so its size decides whether it fits beside inference at all; larger ones do more work for
each read of the weights. `SliceSizer` chooses the size by Algorithm 1 with one bin: memory is the arena, time the slack
that iterations with inference usually leave, and no more than a new request may wait. It chooses again when what was
chosen passes the joint memory limit. An out-of-memory halves the limit; many good steps raise it again.

The planner gives a budget in seconds; `SliceAdmission` holds the slices to it by their upper estimates, learnt from the
very slices that it admits. It starts from nothing: an unknown kind is None, never a constant that stands for a
measurement. Engine and simulator share it.
"""

from collections import defaultdict, deque

from core.batch import IterationSample
from core.config import ExperimentsConfig
from core.ports import LatencyPredictor
from core.types import SliceKind
from scheduler.iteration.slo import SMALLEST_SLICE_TOKENS
from scheduler.memory.arena import ArenaModel
from scheduler.memory.ledger import MemoryLedger, Pool
from scheduler.packing import Bin, Demand, choose_candidate

_MEASUREMENTS = 32
"""Newest measurements that are kept for each kind and size."""
_BLOCKED_BEFORE_RELAX = 8
"""Iterations in which an estimate keeps a slice out before its slowest measurement is forgotten."""

_BUDGETS = 64
_USUAL_QUANTILE = 0.25
"""Quantile of the recent budgets: a slice of the chosen size fits into three of four iterations that have slack."""
_REFRESH_EVERY = 16
"""Iterations between two choices; they matter only when a micro-batch starts."""
_GROW_AFTER = 256
"""Iterations with slices and without running out of memory, after which the limit doubles again."""

_LAYER_KINDS = frozenset({SliceKind.REFERENCE_LAYER, SliceKind.POLICY_LAYER, SliceKind.BACKWARD_LAYER})


class SliceAdmission:
    """Upper estimates by kind and size, and the count of iterations in which they kept everything out."""

    def __init__(self) -> None:
        self._recent: dict[tuple[SliceKind, int], deque[float]] = defaultdict(lambda: deque(maxlen=_MEASUREMENTS))
        self._blocked = 0

    def observe(self, kind: SliceKind, num_tokens: int, latency_s: float) -> None:
        """Take in one measured slice; `num_tokens` is its size, as in `SliceSpec`."""
        self._recent[kind, num_tokens.bit_length()].append(latency_s)

    def upper_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Upper estimate of a slice in seconds; None if its kind is unknown.

        The slowest of the newest of its kind and size, because the longest slice is what delays inference; of another
        size, if there is none, scaled up by tokens.
        """
        nearest = self._nearest(kind, num_tokens)
        if nearest is None:
            return None
        return max(self._recent[kind, nearest]) * 2.0 ** max(0, num_tokens.bit_length() - nearest)

    def fits(self, kind: SliceKind, num_tokens: int, left_s: float, *, first: bool) -> bool:
        """True if the slice's upper estimate is within `left_s` of the iteration's budget; unknown kinds never fit.

        `first`: no slice ran in this iteration yet. Only such refusals count as "kept out": an outlier among the
        measurements must not bar a kind for ever.
        """
        upper_s = self.upper_s(kind, num_tokens)
        fits = upper_s is not None and upper_s <= left_s
        if fits:
            self._blocked = 0
        elif first:
            self._blocked += 1
            if self._blocked % _BLOCKED_BEFORE_RELAX == 0:
                self.relax(kind, num_tokens)
        return fits

    def relax(self, kind: SliceKind, num_tokens: int) -> None:
        """Forget the slowest measurement behind an estimate, unless it is the only one."""
        nearest = self._nearest(kind, num_tokens)
        if nearest is not None and len(self._recent[kind, nearest]) > 1:
            self._recent[kind, nearest].remove(max(self._recent[kind, nearest]))

    def _nearest(self, kind: SliceKind, num_tokens: int) -> int | None:
        """The measured power-of-two size closest to `num_tokens`; the larger one if two are as close."""
        bucket = num_tokens.bit_length()
        sizes = [size for known, size in self._recent if known is kind]
        return min(sizes, key=lambda size: (abs(size - bucket), -size)) if sizes else None


class SliceSizer:
    """Chooses `Plan.slice_tokens`."""

    def __init__(
        self,
        experiments: ExperimentsConfig,
        predictor: LatencyPredictor,
        memory: MemoryLedger,
        max_slice_tokens: int,
        arena: ArenaModel,
    ) -> None:
        self._experiments = experiments
        self._predictor = predictor
        self._memory = memory
        self._max_tokens = self._limit_tokens = max_slice_tokens
        self._arena = arena
        self._budgets_s: deque[float] = deque(maxlen=_BUDGETS)
        self._chosen = 0
        self._age = 0
        self._good_iterations = 0

    def note_budget(self, budget_s: float) -> None:
        """Take in the budget of an iteration that also serves; zero (prefill took all) tells nothing."""
        if budget_s > 0:
            self._budgets_s.append(budget_s)

    def observe(self, sample: IterationSample) -> bool:
        """Learn what micro-batches hold, and from running out of memory. True when the limit is raised again."""
        report = sample.report
        if report.out_of_memory:
            self._limit_tokens = max(SMALLEST_SLICE_TOKENS, self.tokens // 2)
            self._good_iterations = self._age = 0
            return False
        tokens = max((s.num_tokens for s in report.slices if s.kind in _LAYER_KINDS), default=0)
        if not tokens:
            return False
        self._arena.observe(tokens, report.peak_bytes)
        self._good_iterations += 1
        if self._good_iterations < _GROW_AFTER:
            return False
        self._good_iterations = 0
        self._limit_tokens = min(self._max_tokens, 2 * self._limit_tokens)
        return True

    @property
    def tokens(self) -> int:
        """The size chosen last, or the limit before any choice."""
        return self._chosen or self._limit_tokens

    def choose(self, alone_budget_s: float | None, newcomer_s: float) -> int:
        """Padded tokens of micro-batches that start from now on.

        `alone_budget_s` is the slack beside one decoding request, for an engine that has not served yet; None: unknown.
        No slice of the chosen size is predicted to last longer than `newcomer_s`: a request that comes while the
        engine trains waits for the slice that runs, and a step keeps its size when load comes.
        """
        # What the step in progress holds is given back before the next one takes its own.
        room_bytes = self._memory.room_bytes(Pool.ARENA)
        if self._age % _REFRESH_EVERY == 0 or self._arena.predict(self._chosen) > room_bytes:
            budgets_s = sorted(self._budgets_s)
            usual_s = budgets_s[int(_USUAL_QUANTILE * len(budgets_s))] if budgets_s else alone_budget_s
            budget_s = None if usual_s is None else min(usual_s, newcomer_s)
            self._chosen = self._best(budget_s, room_bytes)
            self._age = 0
        self._age += 1
        return self._chosen

    def _best(self, budget_s: float | None, room_bytes: int) -> int:
        if self._experiments.packing == "first_fit":
            return self._limit_tokens
        sizes = self._sizes()
        demands = [demand for demand in map(self._demand, sizes) if demand is not None]
        if budget_s is None or len(demands) < len(sizes):
            return sizes[-1]  # nothing known yet: the smallest delays least
        chosen = choose_candidate(demands, Bin("arena", max(0, room_bytes), budget_s), self._experiments)
        # Smaller slices come before dropping KV blocks: those are for the smallest (`IterationPlanner`).
        return sizes[-1] if chosen is None else sizes[chosen]

    def _sizes(self) -> list[int]:
        sizes = []
        size = self._limit_tokens
        while size > SMALLEST_SLICE_TOKENS:
            sizes.append(size)
            size //= 2
        return [*sizes, min(SMALLEST_SLICE_TOKENS, self._limit_tokens)]

    def _demand(self, num_tokens: int) -> Demand | None:
        backward_s = self._predictor.slice_upper_s(SliceKind.BACKWARD_LAYER, num_tokens)
        policy_s = self._predictor.slice_upper_s(SliceKind.POLICY_LAYER, num_tokens)
        if backward_s is None or policy_s is None:
            return None
        return Demand(self._arena.predict(num_tokens), max(backward_s, policy_s))
