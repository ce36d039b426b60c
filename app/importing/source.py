"""What an import reads from: rows with numbers, and an identity that changes when the data do."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from core.errors import InvalidFeedbackError, MaceError


class SourceError(MaceError):
    """The source cannot be opened or read; the message is one line and says what to do."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it stands in the source. `error` is set if it could not be decoded."""

    number: int
    """Counted from 1: lines of a JSONL file (blank ones too), records of a CSV file, rows of a table."""
    value: object
    done: int
    """How far reading is behind this row, in the source's unit."""
    error: InvalidFeedbackError | None = None


class Source(Protocol):
    """Something to import from."""

    @property
    def label(self) -> str:
        """Name for people."""

    @property
    def identity(self) -> str:
        """The same for the same data, another if they changed."""

    @property
    def total(self) -> int | None:
        """How much there is, in `unit`; None if nobody knows."""

    @property
    def unit(self) -> Literal["bytes", "rows"]:
        """What `total` and `SourceRow.done` count."""

    def rows(self, after: int) -> Iterator[SourceRow]:
        """Rows with numbers above `after`, in order, a bounded number of them in memory.

        Raises:
            SourceError: the data cannot be read (any further).
        """
