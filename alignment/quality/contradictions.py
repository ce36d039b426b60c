"""Opposite preferences on the same prompt and answers: a vote, one for each user.

What is left of the stronger side is its surplus, what is left of the weaker side is nothing: three pairs against one
pull a model as two would. A user who says the opposite of what they said before has changed their mind, so
the newer one stands. Nobody can be told to have changed their mind without a name, so anonymous pairs are one vote
for each side that they take.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from alignment.quality.findings import Finding, make_finding


class Voice(Protocol):
    """A pair of a group that has one prompt and two answers."""

    @property
    def pair_id(self) -> str: ...  # noqa: D102
    @property
    def user(self) -> str | None: ...  # noqa: D102
    @property
    def is_contrary(self) -> bool:
        """Which of the two sides it takes."""
        ...

    @property
    def seq(self) -> int:
        """Position in the order of arrival."""
        ...


def judge_group(voices: Iterable[Voice], is_distrusted: Callable[[str | None], bool]) -> dict[str, list[Finding]]:
    """Findings (superseded, contradiction) of every pair of one group; an empty list clears the pair.

    Distrusted users have no vote, unless there are only such. One finding of either kind at most for each pair.
    """
    ordered = sorted(voices, key=lambda voice: voice.seq)
    latest = {voice.user: voice for voice in ordered if voice.user is not None}
    findings: dict[str, list[Finding]] = {voice.pair_id: [] for voice in ordered}
    standing: list[Voice] = []
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


def _votes(voices: Iterable[Voice]) -> dict[bool, int]:
    users: dict[bool, set[str | None]] = {False: set(), True: set()}
    for voice in voices:
        users[voice.is_contrary].add(voice.user)
    return {side: len(names) for side, names in users.items()}
