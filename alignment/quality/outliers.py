"""Losses that stand out: the live adapter has learnt what users prefer, and one pair says the reverse, loudly.

A robust z-score (Iglewicz and Hoaglin 1993: median and MAD) among recent pairs of trusted users under the same version.
When the adapter is wrong about many of these, preferences have changed and a high loss is news, not noise.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from alignment.quality.findings import Finding, make_finding

MIN_PAIRS = 20
"""Scores under one version before a loss among them can stand out."""
WINDOW = 32
"""Newest of these that tell whether the adapter still agrees with its users."""
MIN_ACCURACY = 0.75
"""Below this it is drift."""
_MAD_TO_SIGMA = 1.4826
_REVERSED = 0.5
_MIN_SCALE = 0.05
"""Nats; a well-trained adapter has losses near zero that differ by less than matters."""


class ScoredPair(Protocol):
    """A pair that the live adapter has scored."""

    @property
    def last_loss(self) -> float | None: ...  # noqa: D102
    @property
    def last_margin(self) -> float | None: ...  # noqa: D102
    @property
    def scored_version(self) -> str | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class LossRange:
    """What is usual under one version."""

    version: str | None
    num_pairs: int
    median: float
    scale: float
    median_margin: float
    is_drifting: bool
    """The adapter is wrong about too many of these pairs for any to be an outlier."""

    @classmethod
    def among(cls, pairs: Sequence[ScoredPair], version: str | None) -> "LossRange | None":
        """Of the pairs (newest first) that this version has scored; None if they are too few."""
        scores = [
            (pair.last_loss, pair.last_margin)
            for pair in pairs
            if pair.scored_version == version and pair.last_loss is not None and pair.last_margin is not None
        ]
        if len(scores) < MIN_PAIRS:
            return None
        losses, margins = [loss for loss, _ in scores], [margin for _, margin in scores[:WINDOW]]
        median = statistics.median(losses)
        spread = statistics.median(abs(loss - median) for loss in losses)
        accuracy = sum(margin > 0 for margin in margins) / len(margins)
        median_margin = statistics.median(margins)
        is_drifting = accuracy < MIN_ACCURACY or median_margin <= 0
        return cls(
            version, len(scores), median, max(_MAD_TO_SIGMA * spread, _MIN_SCALE), median_margin, is_drifting
        )

    def judge(self, pair: ScoredPair, max_z: float, factor: float) -> Finding | None:
        """A finding if the loss is `max_z` or more above what is usual, and the adapter says the reverse.

        A pair that is merely hard has a margin near zero, and must be learnt. A wrong one has a margin on the other
        side: at least half as far from zero as it usually is on the right one.
        """
        if self.is_drifting or pair.last_loss is None or pair.last_margin is None:
            return None
        if pair.last_margin > -_REVERSED * self.median_margin:
            return None
        z = (pair.last_loss - self.median) / self.scale
        if z < max_z:
            return None
        words = (
            f"loss {pair.last_loss:.2f}, z = {z:.1f} among {self.num_pairs} scores of {self.version or 'the base'}"
        )
        return make_finding("outlier", words, factor)
