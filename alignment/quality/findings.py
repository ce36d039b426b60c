"""Why a pair counts less: findings, written on the record as one line each.

A pair's weight is the product of its findings' factors, and each line ends with its factor. So the record explains its
own weight, and a single finding can be replaced later (a user regains trust) with nothing remembered beside it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

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
        """For the record, as `outlier: loss 3.10 has z = 5.1 among 64 scores of v0003: x 0.2`."""
        return f"{self.kind}: {self.words}: x {self.factor:g}"


Findings = Mapping[FindingKind, Finding]
"""By kind."""


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


def weight_of(findings: Findings) -> float:
    """The product of the factors, 0 to 1."""
    return math.prod(finding.factor for finding in findings.values())


def lines_of(findings: Findings) -> tuple[str, ...]:
    """The lines, in a fixed order, for the record."""
    return tuple(findings[kind].line() for kind in _KINDS.values() if kind in findings)


def name_of(user: str | None) -> str:
    """A user in words. The name is the client's text: quoted, escaped and cut."""
    return "anonymous users" if user is None else f"user {user[:_MAX_NAME_CHARS]!r}"
