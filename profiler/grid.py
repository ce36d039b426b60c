"""The points of a measurement, ordered coarse to fine: a grid that is cut short is still well spread."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

DECODE_TOKENS = 12
MIXED_TOKENS = 16


class PointKind(StrEnum):
    """What one point runs."""

    PREFILL = "prefill"
    """One prompt whose first `context` tokens are cached already."""
    DECODE = "decode"
    """`batch` prompts of `context` tokens, then `DECODE_TOKENS` tokens of each."""
    MIXED = "mixed"
    """As DECODE, with a prompt of `num_tokens` coming in between: hybrid iterations."""
    EVALUATE = "evaluate"
    """A fine-tune task that changes nothing: one micro-batch of `num_tokens` padded tokens."""
    TRAIN = "train"
    """A DPO step on one micro-batch of `num_tokens` padded tokens."""


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One measurement."""

    kind: PointKind
    num_tokens: int = 0
    context: int = 0
    batch: int = 1

    @property
    def work(self) -> int:
        """Tokens that the point computes or reads; its time grows at most about in proportion."""
        if self.kind in (PointKind.DECODE, PointKind.MIXED):
            steps = DECODE_TOKENS if self.kind is PointKind.DECODE else MIXED_TOKENS
            return self.batch * (self.context + steps) + self.num_tokens
        return self.context + self.num_tokens


@dataclass(frozen=True, slots=True)
class MeasurePlan:
    """Bounds of a measurement, from the engine's limits."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_tokens: int
    """Of one iteration."""
    max_slice_tokens: int
    """Of one micro-batch; 0: no fine-tune slices."""
    max_pair_tokens: int
    """Prompt and completion of a pair."""
    max_kv_tokens: int | None = None
    """Tokens that the KV cache holds; None: unknown, batches stay within one sequence of full length."""
    budget_s: float = 60.0
    """Measuring time in all; waiting for the engine to be idle does not count."""
    max_point_s: float = 1.0
    """Points expected to take longer are left out."""
    max_rounds: int = 3
    """Times that the whole grid is measured if the budget allows, each time with new prompts."""
    seed: int = 0
    share_prompt: bool = True
    """`experiments.share_prompt`: how many tokens a pair takes."""
    trains: bool = False
    """TRAIN points change the shadow adapter: only where it is thrown away."""
    is_background: bool = False
    """Wait for an idle engine before each point, and give way to every request that arrives."""


def make_grid(plan: MeasurePlan) -> list[GridPoint]:
    """All points, each kind ordered coarse to fine, the kinds taking turns."""
    room = plan.max_model_len - MIXED_TOKENS - 1
    lengths = _powers(8, min(room, plan.max_tokens))
    contexts = [0, *_powers(128, room)]
    batches = _powers(1, plan.max_num_seqs)
    sizes = _powers(32, plan.max_slice_tokens)
    families = [
        [GridPoint(PointKind.PREFILL, n, c) for n in lengths for c in contexts if n + c <= room],
        [GridPoint(PointKind.DECODE, 0, c, b) for b in batches for c in (8, *contexts[1:]) if _fits(plan, b, c)],
        [
            GridPoint(PointKind.MIXED, n, 32, b)
            for b in batches
            for n in lengths
            if b < plan.max_num_seqs and n >= 32 and _fits(plan, b, n)
        ],
        [GridPoint(PointKind.EVALUATE, n) for n in sizes],
        [GridPoint(PointKind.TRAIN, n) for n in sizes] if plan.trains else [],
    ]
    return list(_take_turns(coarse_to_fine(family) for family in families if family))


def coarse_to_fine(points: Sequence[GridPoint]) -> list[GridPoint]:
    """The least work first, then always the point that is farthest from all before it (logarithmic axes)."""
    left = sorted(points, key=lambda point: (point.work, point.num_tokens, point.context))
    if not left:
        return []
    ordered = [left.pop(0)]
    distance = [_distance(point, ordered[0]) for point in left]
    while left:
        index = max(range(len(left)), key=distance.__getitem__)
        chosen = left.pop(index)
        distance.pop(index)
        distance = [min(d, _distance(point, chosen)) for d, point in zip(distance, left, strict=True)]
        ordered.append(chosen)
    return ordered


def _fits(plan: MeasurePlan, batch: int, context: int) -> bool:
    """Half of the KV cache at most, so that nothing is preempted."""
    tokens = batch * (context + MIXED_TOKENS)
    limit = plan.max_model_len if plan.max_kv_tokens is None else plan.max_kv_tokens // 2
    return context + MIXED_TOKENS < plan.max_model_len and (tokens <= limit or batch == 1)


def _powers(first: int, last: int) -> list[int]:
    """Powers of two times `first` up to `last`, and `last` itself."""
    values = []
    value = first
    while value <= last:
        values.append(value)
        value *= 2
    return values if not values or values[-1] == last else [*values, last]


def _distance(a: GridPoint, b: GridPoint) -> float:
    pairs = ((a.num_tokens, b.num_tokens), (a.context, b.context), (a.batch, b.batch))
    return sum(abs(math.log2(1 + x) - math.log2(1 + y)) for x, y in pairs)


def _take_turns(families: Iterable[list[GridPoint]]) -> Iterable[GridPoint]:
    """The first of each family, then every family spread evenly over the order: all end about together."""
    placed = [
        (index / len(family), number, point)
        for number, family in enumerate(families)
        for index, point in enumerate(family)
    ]
    return [point for _, _, point in sorted(placed, key=lambda entry: entry[:2])]
