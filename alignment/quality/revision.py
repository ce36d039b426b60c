"""The records that one round of judging may rewrite: as they are stored, and as they will be."""

from collections.abc import Iterable

from alignment.quality.findings import Finding, FindingKind, lines_of, parse_findings, weight_of
from alignment.store.pairs import QualityChange, StoredPair


class Revision:
    """Findings of some pairs; starts from what their records say."""

    def __init__(self, pairs: Iterable[StoredPair] = ()) -> None:
        self._pairs: dict[str, StoredPair] = {}
        self._findings: dict[str, dict[FindingKind, Finding]] = {}
        self.add(pairs)

    def __contains__(self, pair_id: str) -> bool:
        return pair_id in self._pairs

    def add(self, pairs: Iterable[StoredPair]) -> None:
        """Look at these pairs too; one that is here already stays as it is."""
        for pair in pairs:
            if pair.pair_id not in self._pairs:
                self._pairs[pair.pair_id] = pair
                self._findings[pair.pair_id] = parse_findings(pair.quality_reasons)

    def set(self, pair_id: str, kind: FindingKind, finding: Finding | None) -> None:
        """Replace the pair's finding of a kind; None clears it. An unknown pair was deleted: nothing to do."""
        findings = self._findings.get(pair_id)
        if findings is None:
            return
        if finding is None:
            findings.pop(kind, None)
        else:
            findings[kind] = finding

    def get(self, pair_id: str, kind: FindingKind) -> Finding | None:
        """The pair's finding of a kind."""
        return self._findings.get(pair_id, {}).get(kind)

    def changes(self) -> list[QualityChange]:
        """The records that differ from what is stored."""
        changed = []
        for pair_id, findings in self._findings.items():
            reasons = lines_of(findings)
            if reasons != self._pairs[pair_id].quality_reasons:
                changed.append(QualityChange(pair_id, round(weight_of(findings), 4), reasons))
        return changed
