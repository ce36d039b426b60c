"""The gate: a candidate adapter goes live only if it is no worse than the live one on pairs it never saw.

Both adapters are scored on the same held-out pairs against the same frozen reference. Preference accuracy and mean
margin are sequence-level; a fall of either by more than the configuration allows refuses the candidate.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.config import GateConfig
from core.types import PairScore

_TOLERANCE = 1e-9
"""Rounding of the means; far below anything that a preference could move."""
_MAX_SCORE = 1e100
"""Larger numbers count as infinite, so that no mean can overflow."""
_Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, slots=True)
class GateDecision:
    """The verdict on one candidate and the numbers behind it."""

    accepted: bool
    reason: str
    num_pairs: int = 0
    """Held-out pairs that both adapters were scored on."""
    candidate_accuracy: float | None = None
    live_accuracy: float | None = None
    candidate_margin: float | None = None
    live_margin: float | None = None
    candidate_loss: float | None = None
    live_loss: float | None = None
    candidate_accuracy_interval: tuple[float, float] | None = None
    """Wilson 95 % interval: with few pairs it is wide, and the decision is worth as much."""

    def to_wire(self) -> dict[str, Any]:
        """Built-in types only."""
        return asdict(self)


def judge_candidate(
    candidate_scores: Iterable[PairScore], live_scores: Iterable[PairScore], config: GateConfig
) -> GateDecision:
    """Compare a candidate with the live adapter on the held-out pairs that the live adapter was scored on.

    With no such pairs there is nothing to compare, and the candidate is accepted, saying so. A candidate that
    lacks a score, or has one that is not finite, is refused: its evaluation failed where the live one's did not.
    """
    candidate = {score.pair_id: score for score in candidate_scores}
    live = [score for score in {score.pair_id: score for score in live_scores}.values() if _is_finite(score)]
    if not live:
        return _judge_without_live(list(candidate.values()))
    same = [candidate[score.pair_id] for score in live if score.pair_id in candidate]
    if len(same) < len(live):
        missing = len(live) - len(same)
        return GateDecision(
            False, f"the candidate was not scored on {missing} of {len(live)} held-out pairs", len(same)
        )
    if not all(_is_finite(score) for score in same):
        return GateDecision(False, "the candidate has scores that are not finite", len(same))
    return _compare(same, live, config)


def accuracy_interval(num_right: int, num_pairs: int) -> tuple[float, float]:
    """Wilson score interval (95 %) of a share; unlike the normal one it stays inside [0, 1]."""
    if num_pairs == 0:
        return (0.0, 1.0)
    share, z2 = num_right / num_pairs, _Z95 * _Z95
    centre = share + z2 / (2 * num_pairs)
    spread = _Z95 * math.sqrt(share * (1 - share) / num_pairs + z2 / (4 * num_pairs * num_pairs))
    scale = 1 + z2 / num_pairs
    return (max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def _judge_without_live(candidate: list[PairScore]) -> GateDecision:
    if not all(_is_finite(score) for score in candidate):
        return GateDecision(False, "the candidate has scores that are not finite", 0)
    if candidate:
        return GateDecision(True, "no held-out pair with a score of the live adapter, nothing to compare", 0)
    return GateDecision(True, "no held-out pairs yet", 0)


def _compare(candidate: Sequence[PairScore], live: Sequence[PairScore], config: GateConfig) -> GateDecision:
    accuracy, live_accuracy = _accuracy(candidate), _accuracy(live)
    margin, live_margin = _mean(s.margin for s in candidate), _mean(s.margin for s in live)
    falls = []
    if live_accuracy - accuracy > config.max_accuracy_drop + _TOLERANCE:
        falls.append(f"preference accuracy fell from {live_accuracy:.3f} to {accuracy:.3f}")
    if live_margin - margin > config.max_margin_drop + _TOLERANCE:
        falls.append(f"mean margin fell from {live_margin:.4f} to {margin:.4f}")
    verdict = " and ".join(falls) or f"accuracy {accuracy:.3f} (live {live_accuracy:.3f})"
    return GateDecision(
        accepted=not falls,
        reason=f"{verdict} on {len(live)} held-out pairs",
        num_pairs=len(live),
        candidate_accuracy=accuracy,
        live_accuracy=live_accuracy,
        candidate_margin=margin,
        live_margin=live_margin,
        candidate_loss=_mean(s.loss for s in candidate),
        live_loss=_mean(s.loss for s in live),
        candidate_accuracy_interval=accuracy_interval(sum(s.margin > 0 for s in candidate), len(candidate)),
    )


def _accuracy(scores: Sequence[PairScore]) -> float:
    return sum(score.margin > 0 for score in scores) / len(scores)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def _is_finite(score: PairScore) -> bool:
    return abs(score.loss) < _MAX_SCORE and abs(score.margin) < _MAX_SCORE
