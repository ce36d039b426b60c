"""Counting what became of the rows, in bounded memory."""

import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

_MAX_REASONS = 100
_MAX_COLUMNS = 100
_OTHER = "other reasons"
_DETAIL = re.compile(r"\d+|'[^']*'")
"""What differs between two refusals for the same reason: sizes, places, quoted names."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one row was refused."""

    row: int
    reason: str
    param: str | None
    value: object
    """The row as it stands in the source."""


@dataclass(slots=True)
class Reason:
    """One kind of refusal. The example is the first of them."""

    count: int
    first_row: int
    example: str
    param: str | None


@dataclass(slots=True)
class Tally:
    """Totals of an import, over all its runs."""

    num_rows: int = 0
    num_accepted: int = 0
    num_duplicates: int = 0
    num_rejected: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    """Rows by format, as far as it could be told."""
    dropped_columns: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Reason] = field(default_factory=dict)
    """By the message without its details."""

    def note_format(self, name: str, dropped: tuple[str, ...]) -> None:
        """A row was understood; these of its columns were not taken."""
        self.formats[name] += 1
        for column in (name.encode(errors="replace").decode() for name in dropped):
            if column in self.dropped_columns or len(self.dropped_columns) < _MAX_COLUMNS:
                self.dropped_columns[column] += 1

    def refuse(self, refusal: Refusal) -> None:
        """Count a refused row under its reason."""
        self.num_rejected += 1
        key = _DETAIL.sub("…", refusal.reason)
        if key not in self.reasons and len(self.reasons) >= _MAX_REASONS:
            key = _OTHER
        known = self.reasons.get(key)
        if known is None:
            self.reasons[key] = Reason(1, refusal.row, refusal.reason, refusal.param)
        else:
            known.count += 1

    def to_json(self) -> dict[str, Any]:
        """Built-in types only."""
        data = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            **data,
            "formats": dict(self.formats),
            "dropped_columns": dict(self.dropped_columns),
            "reasons": {key: asdict(reason) for key, reason in self.reasons.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Tally":
        """What `to_json` gave.

        Raises:
            TypeError, ValueError, AttributeError: it is something else.
        """
        data = dict(data)
        data["formats"] = Counter(data["formats"])
        data["dropped_columns"] = Counter(data["dropped_columns"])
        data["reasons"] = {key: Reason(**reason) for key, reason in data["reasons"].items()}
        return cls(**data)
