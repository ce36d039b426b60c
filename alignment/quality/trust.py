"""Trust in users: how often the live adapter agrees with a user, against how often it agrees with all others.

The adapter has learnt from everybody, so it speaks for the majority of the weight it was trained on. A user whose pairs
it gets wrong far more often than everybody else's is hostile, careless or of another taste; for one shared adapter
the three are the same. Both shares have Wilson bounds; distrust begins where they no longer touch.

What is compared is fair to slow users: an early adapter agrees with nobody, so the others' share is taken over the
same adapter versions as the user's own scores, in the same proportion. And half of the users or more are never
distrusted: when so many disagree with the adapter, it is the adapter that is out of date.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from alignment.intervals import wilson
from alignment.store.pair_matches import UserScore

_MIN_MARGIN = 0.01
"""Margins (nats) closer to zero are no agreement and no disagreement: the bare base has zero for every pair."""
_MIN_PAIRS = 8
"""Scored pairs of a user before their agreement with everybody else is judged."""
_CONFIDENCE = 0.95
"""A user is distrusted when their agreement is below that of the others with this confidence."""
MAX_OF_ONE_USER = 32
"""Newest scores of a user that count: old enough habits are forgotten, and nobody is the whole of the others."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Agreement of the live adapter with one user (None: all who gave no name), and what follows from it."""

    user: str | None
    agreement: float
    """Share of the user's pairs that the live adapter gets right."""
    num_pairs: int
    others: float
    """The same of everybody else, under the same adapter versions."""
    is_suspect: bool = False
    """The bounds of the two shares do not touch."""
    is_distrusted: bool = False
    """A suspect, and suspects are few."""

    @property
    def factor(self) -> float:
        """Factor of a distrusted user's pairs: 0 for one who is right half as often as the others, or less.

        Of labels of which a share p is right, 2p - 1 is left when right and wrong ones cancel. In tenths, so that
        records are not rewritten for every new score.
        """
        relative = self.agreement / self.others if self.others else 1.0
        return round(min(1.0, max(0.0, 2 * relative - 1)), 1) if self.is_distrusted else 1.0


def judge(user: str | None, own: Sequence[UserScore], recent: Sequence[UserScore]) -> Standing | None:
    """Compare a user's newest scores (newest first) with the others' among `recent`; None if there are too few."""
    others: defaultdict[str | None, list[bool]] = defaultdict(list)
    seen: Counter[str | None] = Counter()
    for score in recent:
        if score.user != user and _says_something(score) and seen[score.user] < MAX_OF_ONE_USER:
            seen[score.user] += 1
            others[score.version].append(score.margin > 0)
    mine = [score for score in own if _says_something(score) and score.version in others][:MAX_OF_ONE_USER]
    num_others = sum(len(others[version]) for version in {score.version for score in mine})
    if min(len(mine), num_others) < _MIN_PAIRS:
        return None
    num_right = sum(score.margin > 0 for score in mine)
    expected = sum(fmean(others[score.version]) for score in mine) / len(mine)
    _, upper = wilson(num_right, len(mine), _CONFIDENCE)
    lower, _ = wilson(expected * num_others, num_others, _CONFIDENCE)
    return Standing(user, num_right / len(mine), len(mine), expected, is_suspect=upper < lower)


def settle(standings: Iterable[Standing]) -> list[Standing]:
    """Distrust the suspects, if they are fewer than half of all judged users."""
    judged = list(standings)
    suspects = sum(standing.is_suspect for standing in judged)
    few = 2 * suspects < len(judged)
    return [replace(standing, is_distrusted=standing.is_suspect and few) for standing in judged]


def _says_something(score: UserScore) -> bool:
    return abs(score.margin) >= _MIN_MARGIN
