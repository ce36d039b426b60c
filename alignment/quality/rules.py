"""Three rules about pairs: opposite preferences, one user who floods the rest, and losses that stand out.

Contradictions, on the same prompt and answers, are a vote, one for each user. What is left of the stronger side is its
surplus, what is left of the weaker side is nothing: three pairs against one pull a model as two would. A user who says
the opposite of what they said before has changed their mind, so the newer one stands. Nobody can be told to have
changed their mind without a name, so anonymous pairs are one vote for each side that they take.

A flood is one user who sends more than everybody else together. Anonymous pairs count as one user here: if leaving out
the name were a way around the rule, it would hold nobody back.

An outlier: the live adapter has learnt what users prefer, and one pair says the reverse, loudly. Measured by a robust
z-score (Iglewicz and Hoaglin 1993: median and MAD) among recent pairs of trusted users under the same version. When the
adapter is wrong about many of these, preferences have changed and a high loss is news, not noise.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from alignment.quality.findings import Finding, make_finding, name_of
from alignment.store.pair_matches import PairMatch
from alignment.store.pairs import StoredPair

FLOOD_WINDOW = 200
"""Newest pairs among which one user's share is measured."""
_MIN_FLOOD_PAIRS = 20
"""Pairs before anybody's share means something."""
_NOT_WORTH_SAYING = 0.95
_OUTLIER_Z = 3.5
"""Robust z-score of a pair's loss among recent ones above which it is an outlier."""
_OUTLIER_WEIGHT = 0.5
"""Factor of an outlier. Below 0.5 the drift detectors would not see the first pairs of a new taste."""
_MIN_SCORES = 20
"""Scores under one version before a loss among them can stand out."""
_WINDOW = 32
"""Newest of these that tell whether the adapter still agrees with its users."""
_MIN_ACCURACY = 0.75
"""Below this it is drift."""
_MAD_TO_SIGMA = 1.4826
_REVERSED = 0.5
_MIN_SCALE = 0.05
"""Nats; a well-trained adapter has losses near zero that differ by less than matters."""


def judge_group(
    voices: Iterable[PairMatch], is_distrusted: Callable[[str | None], bool]
) -> dict[str, list[Finding]]:
    """Findings (superseded, contradiction) of every pair of one prompt and two answers; an empty list clears the pair.

    Distrusted users have no vote, unless there are only such. One finding of either kind at most for each pair.
    """
    ordered = sorted(voices, key=lambda voice: voice.seq)
    latest = {voice.user: voice for voice in ordered if voice.user is not None}
    findings: dict[str, list[Finding]] = {voice.pair_id: [] for voice in ordered}
    standing: list[PairMatch] = []
    for voice in ordered:
        newest = latest.get(voice.user) if voice.user is not None else None
        if newest is not None and newest.is_contrary != voice.is_contrary:
            words = f"the same user preferred the opposite later, in {newest.pair_id}"
            findings[voice.pair_id].append(make_finding("superseded", words, 0.0))
        else:
            standing.append(voice)
    votes = _votes([voice for voice in standing if not is_distrusted(voice.user)] or standing)
    for voice in standing:
        own, against = votes[voice.is_contrary], votes[not voice.is_contrary]
        if against:
            words = f"{against} of {own + against} users prefer the opposite"
            findings[voice.pair_id].append(make_finding("contradiction", words, 1 - against / own if own else 0.0))
    return findings


def _votes(voices: Iterable[PairMatch]) -> dict[bool, int]:
    users: dict[bool, set[str | None]] = {False: set(), True: set()}
    for voice in voices:
        users[voice.is_contrary].add(voice.user)
    return {side: len(names) for side, names in users.items()}


def judge_volume(user: str | None, counts: Mapping[str, int], present: int, max_share: float) -> Finding | None:
    """Hold a user's pairs at `max_share` of a window; None if they are below it.

    Args:
        counts: pairs of each user in the window; "" named no user.
        present: users that send at all, in the window or not long before; two others are needed to compare with.
        max_share: bound; among n users nobody is held below 1/n.
    """
    number, total = counts.get(user or "", 0), sum(counts.values())
    if total < _MIN_FLOOD_PAIRS or present < 3:
        return None
    bound = max(max_share, 1 / present)
    others = max(1, total - number)
    share = number / total
    if share <= bound or bound >= 1:
        return None
    # w * number is the share `bound` of w * number + others
    factor = bound * others / ((1 - bound) * number)
    if factor > _NOT_WORTH_SAYING:
        return None
    words = f"{name_of(user)} sent {share:.0%} of the newest {total} pairs, at most {bound:.0%} count"
    return make_finding("flooding", words, factor)


@dataclass(frozen=True, slots=True)
class LossRange:
    """The losses that are usual under one version."""

    version: str | None
    num_pairs: int
    median: float
    scale: float
    median_margin: float
    is_drifting: bool
    """The adapter is wrong about too many of these pairs for any to be an outlier."""

    @classmethod
    def among(cls, pairs: Sequence[StoredPair], version: str | None) -> "LossRange | None":
        """Take the range of the pairs (newest first) that this version has scored; None if they are too few."""
        scores = [
            (pair.last_loss, pair.last_margin)
            for pair in pairs
            if pair.scored_version == version and pair.last_loss is not None and pair.last_margin is not None
        ]
        if len(scores) < _MIN_SCORES:
            return None
        losses, margins = [loss for loss, _ in scores], [margin for _, margin in scores[:_WINDOW]]
        median = statistics.median(losses)
        spread = statistics.median(abs(loss - median) for loss in losses)
        accuracy = sum(margin > 0 for margin in margins) / len(margins)
        median_margin = statistics.median(margins)
        is_drifting = accuracy < _MIN_ACCURACY or median_margin <= 0
        return cls(
            version, len(scores), median, max(_MAD_TO_SIGMA * spread, _MIN_SCALE), median_margin, is_drifting
        )

    def judge(self, pair: StoredPair) -> Finding | None:
        """A finding if the loss is `_OUTLIER_Z` or more above what is usual, and the adapter says the reverse.

        A pair that is merely hard has a margin near zero, and must be learnt. A wrong one has a margin on the other
        side: at least half as far from zero as it usually is on the right one.
        """
        if self.is_drifting or pair.last_loss is None or pair.last_margin is None:
            return None
        if pair.last_margin > -_REVERSED * self.median_margin:
            return None
        z = (pair.last_loss - self.median) / self.scale
        if z < _OUTLIER_Z:
            return None
        words = (
            f"loss {pair.last_loss:.2f}, z = {z:.1f} among {self.num_pairs} scores of {self.version or 'the base'}"
        )
        return make_finding("outlier", words, _OUTLIER_WEIGHT)
