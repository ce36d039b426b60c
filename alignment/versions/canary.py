"""The verdict on a canary: whether the version on trial is worse than the live one, for its users and by the clock.

Both questions compare two shares of independent trials (thumbs up of all thumbs, requests within their SLO of all
requests) by a one-sided lower bound of their difference: Newcombe's hybrid of two Wilson intervals (Statistics in
Medicine 17, 1998, method 10), which is sound for small counts and for shares of 0 and 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

from alignment.intervals import wilson
from core.alignment_config import VersionsConfig

CONFIDENCE = 0.95
"""One-sided confidence of both comparisons."""
MAX_SLO_DROP = 0.02
"""Largest allowed fall of the share of requests within their SLO, against the live version's."""


@dataclass(frozen=True, slots=True)
class Share:
    """`hits` of `total` trials."""

    hits: int = 0
    total: int = 0

    def __str__(self) -> str:
        return f"{self.hits} of {self.total}"


@dataclass(frozen=True, slots=True)
class Arm:
    """Ratings and requests of one version since the trial began."""

    ratings: Share = Share()
    """Thumbs up of all thumbs."""
    slo: Share = Share()
    """Requests within TTFT and TBT targets."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on the canary."""

    action: Literal["wait", "promote", "roll_back"]
    reason: str


def judge_canary(canary: Arm, live: Arm, elapsed_s: float, config: VersionsConfig) -> Verdict:
    """Compare the canary with the live version, `elapsed_s` after its trial began.

    Either comparison counts once both versions have enough trials (`canary_min_ratings`, `canary_min_requests`), or,
    when `canary_max_s` is over, with what there is.
    """
    over = elapsed_s >= config.canary_max_s
    rated = min(canary.ratings.total, live.ratings.total) >= config.canary_min_ratings
    served = min(canary.slo.total, live.slo.total) >= config.canary_min_requests
    complaints = []
    if (rated or over) and least_drop(canary.ratings, live.ratings, CONFIDENCE) > 0:
        complaints.append(f"thumbs up {canary.ratings} (live {live.ratings})")
    if (served or over) and least_drop(canary.slo, live.slo, CONFIDENCE) > MAX_SLO_DROP:
        complaints.append(f"within the SLO {canary.slo} requests (live {live.slo})")
    seen = f"thumbs up {canary.ratings} (live {live.ratings}), within the SLO {canary.slo} (live {live.slo})"
    if complaints:
        return Verdict("roll_back", f"worse than live at {CONFIDENCE:.0%}: {' and '.join(complaints)}")
    if rated and served:
        return Verdict("promote", f"not worse than live: {seen}")
    if over:
        return Verdict("promote", f"nothing spoke against it in {elapsed_s:.0f} s: {seen}")
    return Verdict("wait", seen)


def least_drop(canary: Share, live: Share, confidence: float) -> float:
    """Lower bound of how far the canary's share is below the live one's, one-sided at `confidence`; -1 if unknown."""
    if not canary.total or not live.total:
        return -1.0
    p_live, p_canary = live.hits / live.total, canary.hits / canary.total
    low, _ = wilson(live.hits, live.total, confidence)
    _, high = wilson(canary.hits, canary.total, confidence)
    return (p_live - p_canary) - math.hypot(p_live - low, high - p_canary)
