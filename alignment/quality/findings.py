"""Findings, the reasons for which a pair counts less, written on the record as one line each.

A pair's quality is the product of its findings' factors, and each line ends with its factor. So the record explains its
own quality, and a single finding can be replaced later (a user regains trust) with nothing remembered beside it.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from alignment.store.pairs import QualityChange, StoredPair

FindingKind = Literal["near duplicate", "superseded", "contradiction", "flooding", "outlier", "trust"]
_KINDS: dict[str, FindingKind] = {kind: kind for kind in get_args(FindingKind)}
_LINE = re.compile(r"(?P<kind>[a-z ]+): (?P<words>.*): x (?P<factor>[01](?:\.\d+)?)", re.DOTALL)
_MAX_NAME_CHARS = 60


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason to count a pair less. At most one of each kind applies to a pair."""

    kind: FindingKind
    words: str
    factor: float
    """0 to 1, with two digits: what the line says is what is multiplied."""

    def line(self) -> str:
        """The line for the record, as `outlier: loss 3.10 has z = 5.1 among 64 scores of v0003: x 0.2`."""
        return f"{self.kind}: {self.words}: x {self.factor:g}"


def make_finding(kind: FindingKind, words: str, factor: float) -> Finding:
    """A finding with its factor bounded to 0..1 and rounded to two digits."""
    return Finding(kind, words, round(min(1.0, max(0.0, factor)), 2))


def parse_findings(lines: Iterable[str]) -> dict[FindingKind, Finding]:
    """Findings of a record by kind; a line that is none (another program's, say) is ignored."""
    found: dict[FindingKind, Finding] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        kind = _KINDS.get(match["kind"]) if match is not None else None
        if match is not None and kind is not None:
            found[kind] = Finding(kind, match["words"], float(match["factor"]))
    return found


def name_of(user: str | None) -> str:
    """A user in words. The name is the client's text: quoted, escaped and cut."""
    return "anonymous users" if user is None else f"user {user[:_MAX_NAME_CHARS]!r}"


class Revision:
    """Findings of the pairs that one round of judging may rewrite; starts from what their records say."""

    def __init__(self, pairs: Iterable[StoredPair] = ()) -> None:
        self._pairs: dict[str, StoredPair] = {}
        self._findings: dict[str, dict[FindingKind, Finding]] = {}
        self.add(pairs)

    def __contains__(self, pair_id: str) -> bool:
        return pair_id in self._pairs

    def add(self, pairs: Iterable[StoredPair]) -> None:
        """Take in more pairs; one that is here already stays as it is."""
        for pair in pairs:
            if pair.pair_id not in self._pairs:
                self._pairs[pair.pair_id] = pair
                self._findings[pair.pair_id] = parse_findings(pair.quality_reasons)

    def set(self, pair_id: str, kind: FindingKind, finding: Finding | None) -> None:
        """Replace the pair's finding of a kind; None clears it. An unknown pair was deleted: nothing to do."""
        findings = self._findings.get(pair_id, {})
        findings.pop(kind, None)
        if finding is not None:
            findings[kind] = finding

    def get(self, pair_id: str, kind: FindingKind) -> Finding | None:
        """The pair's finding of a kind."""
        return self._findings.get(pair_id, {}).get(kind)

    def changes(self) -> list[QualityChange]:
        """The records that differ from what is stored."""
        changed = []
        for pair_id, findings in self._findings.items():
            reasons = tuple(findings[kind].line() for kind in _KINDS.values() if kind in findings)
            if reasons != self._pairs[pair_id].quality_reasons:
                quality = math.prod(finding.factor for finding in findings.values())
                changed.append(QualityChange(pair_id, round(quality, 4), reasons))
        return changed
