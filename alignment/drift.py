"""First drift signal: does the live adapter already agree with the newest preferences?

Every pair is scored by the adapter in training just before the step that trains on it ("test, then train"; repeats
count too). Over a sliding window of those scores, drift is a preference accuracy below, or a mean DPO loss above,
the configured bounds. The interface follows river's drift detectors (`update`, then read a flag), with fixed
bounds instead of a statistical test: the untrained loss ln 2 and the perfect accuracy 1 are known in advance, so no
reference window has to be learned.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from core.config import DriftConfig

_MAX_SCORE = 1e100
"""Sums of this size cannot overflow."""


class DriftWindow:
    """The newest `config.window` scores. Deterministic: the same updates give the same answers."""

    def __init__(self, config: DriftConfig) -> None:
        self._config = config
        self._scores: deque[tuple[float, float]] = deque(maxlen=config.window)
        self.num_ignored = 0
        """Scores that were not finite, or absurd; they say something about the adapter, nothing about preferences."""

    def update(self, loss: float, margin: float) -> None:
        """Add the score of one new pair: DPO loss (nats) and implicit reward margin."""
        if abs(loss) < _MAX_SCORE and abs(margin) < _MAX_SCORE:
            self._scores.append((float(loss), float(margin)))
        else:
            self.num_ignored += 1

    def reset(self) -> None:
        """Forget all scores, because another adapter is live: the old ones describe the old adapter."""
        self._scores.clear()

    @property
    def num_pairs(self) -> int:
        """Scores in the window."""
        return len(self._scores)

    @property
    def accuracy(self) -> float | None:
        """Share of pairs whose margin is above zero; None for an empty window."""
        if not self._scores:
            return None
        return sum(margin > 0 for _, margin in self._scores) / len(self._scores)

    @property
    def mean_loss(self) -> float | None:
        """Mean DPO loss; None for an empty window."""
        return math.fsum(loss for loss, _ in self._scores) / len(self._scores) if self._scores else None

    @property
    def mean_margin(self) -> float | None:
        """Mean implicit reward margin; None for an empty window."""
        return math.fsum(margin for _, margin in self._scores) / len(self._scores) if self._scores else None

    @property
    def drifted(self) -> bool:
        """Do the newest preferences call for training?"""
        return bool(self._complaints())

    @property
    def reason(self) -> str:
        """Why `drifted` is what it is, in words."""
        complaints = self._complaints()
        if complaints:
            return f"{' and '.join(complaints)} over {self.num_pairs} pairs"
        if self.num_pairs < self._min_pairs:
            return f"{self.num_pairs} of {self._min_pairs} pairs needed"
        return f"the live adapter agrees with the newest {self.num_pairs} pairs"

    def to_dict(self) -> dict[str, Any]:
        """State as JSON; the configuration is not part of it."""
        return {"scores": [list(score) for score in self._scores], "num_ignored": self.num_ignored}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], config: DriftConfig) -> "DriftWindow":
        """Inverse of `to_dict`; a smaller window than before keeps the newest scores."""
        window = cls(config)
        for loss, margin in state["scores"]:
            window.update(loss, margin)
        window.num_ignored += int(state["num_ignored"])
        return window

    @property
    def _min_pairs(self) -> int:
        """A window that is smaller than `min_pairs` could otherwise never report anything."""
        return min(self._config.min_pairs, self._config.window)

    def _complaints(self) -> list[str]:
        accuracy, mean_loss = self.accuracy, self.mean_loss
        if accuracy is None or mean_loss is None or self.num_pairs < self._min_pairs:
            return []
        complaints = []
        if accuracy < self._config.min_accuracy:
            complaints.append(f"preference accuracy {accuracy:.2f} is below {self._config.min_accuracy:.2f}")
        if mean_loss > self._config.max_loss:
            complaints.append(f"mean DPO loss {mean_loss:.3f} is above {self._config.max_loss:.3f}")
        return complaints
