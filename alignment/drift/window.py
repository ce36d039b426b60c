"""Agreement of the live adapter with the newest preferences: fixed bounds on the scores of the newest pairs.

Under one version of the adapter, every pair counts once. When another version goes live the scores are void: they
describe the adapter before it. The pairs stay known and are scored again. The bounds are fixed, because the untrained
loss ln 2 and the perfect accuracy 1 are known in advance, so that no reference window has to be learned.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from core.alignment_config import DriftConfig

MIN_PAIRS = 8
"""Scores in the window before drift is reported; a smaller window needs to be full."""


class Score(NamedTuple):
    """DPO loss (nats) and implicit reward margin of one pair under the live adapter."""

    loss: float
    margin: float


class Means(NamedTuple):
    """Summary of the window; means are None for an empty one."""

    num_pairs: int
    """Scores in the window."""
    accuracy: float | None
    """Share of pairs whose margin is above zero."""
    mean_loss: float | None
    mean_margin: float | None


class LevelWindow:
    """The newest `config.window` pairs and their scores. Deterministic; callers check that scores are finite."""

    def __init__(self, config: DriftConfig) -> None:
        self._config = config
        self._scores: OrderedDict[str, Score | None] = OrderedDict()
        """Scores by pair id, oldest first; None: not scored by the version that is live now."""

    def __contains__(self, pair_id: str) -> bool:
        return pair_id in self._scores

    def add(self, pair_id: str, score: Score) -> None:
        """A new pair; the oldest leaves a full window."""
        self._scores[pair_id] = score
        if len(self._scores) > self._config.window:
            self._scores.popitem(last=False)

    def rescore(self, pair_id: str, score: Score) -> bool:
        """A pair scored again. One that the window does not know is taken as older than all, if there is room."""
        is_known = pair_id in self._scores
        if not is_known and len(self._scores) >= self._config.window:
            return False
        self._scores[pair_id] = score
        if not is_known:
            self._scores.move_to_end(pair_id, last=False)
        return True

    def discard(self, pair_id: str) -> bool:
        """Drop a pair; False if it is not in the window."""
        if pair_id not in self._scores:
            return False
        del self._scores[pair_id]
        return True

    def keep_newest(self, number: int) -> None:
        """Drop all but the newest pairs: preferences changed, and the others say what users wanted before."""
        while len(self._scores) > number:
            self._scores.popitem(last=False)

    def clear_scores(self) -> None:
        """Another adapter is live."""
        self._scores = OrderedDict.fromkeys(self._scores)

    @property
    def unscored_ids(self) -> list[str]:
        """Pairs that the live version has not scored, newest first."""
        return [pair_id for pair_id, score in reversed(self._scores.items()) if score is None]

    @property
    def full_enough(self) -> bool:
        """True if there are scores enough to judge."""
        return self.means().num_pairs >= self._needed

    def means(self) -> Means:
        """Over the scores of the version that is live now."""
        valid = [score for score in self._scores.values() if score is not None]
        if not valid:
            return Means(0, None, None, None)
        return Means(
            len(valid),
            fmean(score.margin > 0 for score in valid),
            fmean(score.loss for score in valid),
            fmean(score.margin for score in valid),
        )

    def complaint(self) -> str | None:
        """The live adapter's failings, in words; None if nothing, or if there are too few scores."""
        number, accuracy, mean_loss, _ = self.means()
        if accuracy is None or mean_loss is None or number < self._needed:
            return None
        complaints = []
        if accuracy < self._config.min_accuracy:
            complaints.append(f"preference accuracy {accuracy:.2f} is below {self._config.min_accuracy:.2f}")
        if mean_loss > self._config.max_loss:
            complaints.append(f"mean DPO loss {mean_loss:.3f} is above {self._config.max_loss:.3f}")
        return f"{' and '.join(complaints)} over {number} pairs" if complaints else None

    def verdict(self) -> str:
        """The complaint, or why there is none."""
        complaint = self.complaint()
        if complaint is not None:
            return complaint
        number = self.means().num_pairs
        if number < self._needed:
            return f"{number} of {self._needed} pairs needed"
        return f"the live adapter agrees with the newest {number} pairs"

    def to_state(self) -> list[list[Any]]:
        """Pairs and scores as JSON, oldest first."""
        return [[pair_id, *(score or (None, None))] for pair_id, score in self._scores.items()]

    @classmethod
    def from_state(cls, state: Iterable[list[Any]], config: DriftConfig) -> "LevelWindow":
        """Inverse of `to_state`; a smaller window than before keeps the newest pairs."""
        window = cls(config)
        rows: Mapping[str, Score | None] = {
            row[0]: None if row[1] is None else Score(float(row[1]), float(row[2])) for row in state
        }
        window._scores = OrderedDict(list(rows.items())[-config.window :])
        return window

    @property
    def _needed(self) -> int:
        return min(MIN_PAIRS, self._config.window)
