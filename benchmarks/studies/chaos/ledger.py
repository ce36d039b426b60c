"""What was sent as feedback, what was acknowledged, and whether the store has exactly that."""

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.tiny.knowledge import Style, preference_questions, render

_USERS = 12
_PAIRS_PER_TASTE = 150
"""After so many preferences the preferred style changes, so that there is always something to learn."""

Content = tuple[str, str, str]
"""Prompt, chosen, rejected."""


def preferences(seed: int) -> Iterator[dict[str, Any]]:
    """Endless bodies of `POST /v1/feedback`; no id and no prompt comes twice, none is a near-duplicate."""
    rng = random.Random(seed)
    questions = preference_questions()
    styles = list(Style)
    used: set[tuple[int, int]] = set()
    for number in itertools.count():
        while (both := tuple(rng.sample(range(len(questions)), 2))) in used:
            pass
        used.add((both[0], both[1]))
        liked = styles[number // _PAIRS_PER_TASTE % len(styles)]
        disliked = rng.choice([style for style in styles if style is not liked])
        first, second = (questions[i] for i in both)
        yield {
            "id": f"chaos-{seed}-{number}",
            "prompt": [{"role": "user", "content": f"{first.text} {second.text}"}],
            "chosen": f"{render(first, liked)} {render(second, liked)}",
            "rejected": f"{render(first, disliked)} {render(second, disliked)}",
            "user": f"user-{rng.randrange(_USERS)}",
        }


@dataclass(frozen=True, slots=True)
class Audit:
    """The store against the ledger."""

    acknowledged: int
    in_doubt: int
    """Sent, never acknowledged: they may be there or not, but not twice."""
    in_doubt_stored: int
    lost: list[str]
    """Acknowledged ids that are not there, are not what was sent, or have no pair."""
    duplicated: list[str]
    """Ids that are there more than once, or whose content or pair is."""
    unknown: int
    """Records that nobody sent."""


@dataclass(slots=True)
class Ledger:
    """Bodies by id as they were sent, and which ids the server thanked for."""

    sent: dict[str, dict[str, Any]] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    """Ids that the server called wrong, and its words: then the run itself is wrong."""
    answers: Counter[str] = field(default_factory=Counter)
    """Posts by HTTP status, or by the name of the transport error."""
    repeats: int = 0
    """Posts that were repeated because the one before was not acknowledged."""

    def audit(self, stored: Iterable[dict[str, Any]], exported: Iterable[dict[str, Any]]) -> Audit:
        """Compare.

        Args:
            stored: every entry of `GET /v1/feedback`.
            exported: every row of `GET /v1/feedback/export?format=trl`, one for each pair.
        """
        entries = list(stored)
        ids = Counter(str(entry["id"]) for entry in entries)
        found = {str(entry["id"]): _content(entry["item"]) for entry in entries}
        contents = Counter(_content(entry["item"]) for entry in entries)
        pairs = Counter(_content(row) for row in exported)
        wanted = {one: _content(self.sent[one]) for one in self.acknowledged}
        lost = [one for one, content in wanted.items() if found.get(one) != content or not pairs[content]]
        doubled = [
            one for one, content in found.items() if ids[one] > 1 or contents[content] > 1 or pairs[content] > 1
        ]
        in_doubt = self.sent.keys() - self.acknowledged - self.refused.keys()
        return Audit(
            acknowledged=len(self.acknowledged),
            in_doubt=len(in_doubt),
            in_doubt_stored=len(in_doubt & ids.keys()),
            lost=sorted(lost),
            duplicated=sorted(doubled),
            unknown=len(ids.keys() - self.sent.keys()),
        )


def audit_to_wire(audit: Audit) -> dict[str, Any]:
    """Counts, and the first few ids."""
    wire = asdict(audit)
    for name in ("lost", "duplicated"):
        ids = wire.pop(name)
        wire |= {name: len(ids), f"{name}_ids": ids[:20]}
    return wire


def _content(item: dict[str, Any]) -> Content:
    return _text(item.get("prompt")), _text(item.get("chosen")), _text(item.get("rejected"))


def _text(value: Any) -> str:
    """A text, or the last message of a conversation."""
    if isinstance(value, list) and value:
        return str(value[-1].get("content"))
    return str(value)
