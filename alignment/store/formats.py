"""Preference files: JSON lines in, JSON lines out.

Read: every format of `alignment.records.row_formats`, found line by line, so mixed files work. Written: TRL or OpenAI
rows with nothing but the format's own keys, because other tools refuse or mistrust extra ones.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Protocol

from alignment.records.json_checks import canonical_json
from alignment.records.pairs import Prompt
from alignment.records.row_formats import RowFormat, to_api_row
from alignment.store.intake import ItemOutcome
from core.errors import InvalidFeedbackError

ExportFormat = Literal["trl", "openai"]

_UTF8_BOM = "\ufeff"


class PairTexts(Protocol):
    """What an export row needs of a pair."""

    @property
    def prompt(self) -> Prompt:
        """Messages or plain text."""

    @property
    def chosen(self) -> str:
        """The better answer."""

    @property
    def rejected(self) -> str:
        """The worse answer."""


@dataclass(frozen=True, slots=True)
class ImportedLine:
    """One line that is not blank. Exactly one of `item` and `error` is set."""

    line_number: int
    """Counted from 1, blank lines included, as editors do."""
    item: dict[str, Any] | None = None
    """The row as our API takes it."""
    format: RowFormat | None = None
    error: InvalidFeedbackError | None = None


@dataclass(frozen=True, slots=True)
class LineError:
    """Why one line was refused."""

    line_number: int
    message: str
    param: str | None = None


@dataclass(slots=True)
class ImportReport:
    """What became of a file."""

    num_accepted: int = 0
    num_duplicates: int = 0
    num_errors: int = 0
    errors: list[LineError] = field(default_factory=list)
    """The first `MAX_REPORTED_ERRORS` of them."""


MAX_REPORTED_ERRORS = 1000
"""A client that sends at most so many lines at once hears about each of them."""


def read_jsonl(lines: Iterable[str | bytes]) -> Iterator[ImportedLine]:
    """Decode line by line; a bad line becomes an error with its number, and reading goes on."""
    for number, line in enumerate(lines, start=1):
        try:
            value = decode_line(line)
        except InvalidFeedbackError as error:
            yield ImportedLine(number, error=error)
        else:
            if value is not BLANK:
                yield _read_row(number, value)


BLANK = object()
"""What `decode_line` gives for an empty line."""


def decode_line(line: str | bytes) -> object:
    """The JSON value of one line, or `BLANK`.

    Raises:
        InvalidFeedbackError: not UTF-8, not JSON, or JSON that only Python takes (NaN, infinity).
    """
    try:
        text = (line.decode() if isinstance(line, bytes) else line).removeprefix(_UTF8_BOM).strip()
        return json.loads(text, parse_constant=_refuse_constant) if text else BLANK
    except UnicodeDecodeError as error:
        raise InvalidFeedbackError("the line is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # also: an integer with thousands of digits
        raise InvalidFeedbackError(f"the line is not JSON: {error}") from error


def _read_row(number: int, value: object) -> ImportedLine:
    if not isinstance(value, dict):
        return ImportedLine(number, error=InvalidFeedbackError("the line is not a JSON object"))
    try:
        row = to_api_row(value)
    except InvalidFeedbackError as error:
        return ImportedLine(number, error=error)
    return ImportedLine(number, row.item, row.format)


def import_jsonl(
    lines: Iterable[str | bytes],
    add: Callable[[Sequence[object]], Sequence[ItemOutcome]],
    batch_items: int = 500,
) -> ImportReport:
    """Feed a file into `FeedbackStore.add`, one transaction per `batch_items` lines.

    Lines without an id get one from their content, so an interrupted import is simply repeated.

    Raises:
        StoreUnavailableError: from `add`; the batches before are stored.
    """
    report = ImportReport()
    batch: list[ImportedLine] = []
    for line in read_jsonl(lines):
        if line.error is not None:
            _note_error(report, line.line_number, str(line.error), line.error.param)
            continue
        batch.append(line)
        if len(batch) >= batch_items:
            _import_batch(batch, add, report)
            batch = []
    _import_batch(batch, add, report)
    return report


def with_id(item: dict[str, Any]) -> dict[str, Any]:
    """`item` with an id of its content, unless it has one: the same row is the same record, however often it comes."""
    if item.get("id") is not None:
        return item
    try:
        digest = hashlib.sha256(canonical_json(item).encode()).hexdigest()
    except (TypeError, ValueError, RecursionError):  # will be refused with a better message when it is parsed
        return item
    return {**item, "id": f"import-{digest[:32]}"}


def export_row(pair: PairTexts, format: ExportFormat) -> dict[str, Any]:
    """One row of a TRL or OpenAI preference file."""
    return trl_row(pair) if format == "trl" else openai_row(pair)


def trl_row(pair: PairTexts) -> dict[str, Any]:
    """Plain text stays text; chat becomes TRL's conversational form."""
    if isinstance(pair.prompt, str):
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return {"prompt": pair.prompt, "chosen": _answer(pair.chosen), "rejected": _answer(pair.rejected)}


def openai_row(pair: PairTexts) -> dict[str, Any]:
    """OpenAI's form is chat only: a plain-text prompt becomes a user message, which is not undone by an import."""
    is_text = isinstance(pair.prompt, str)
    messages = [{"role": "user", "content": pair.prompt}] if is_text else pair.prompt
    return {
        "input": {"messages": messages},
        "preferred_output": _answer(pair.chosen),
        "non_preferred_output": _answer(pair.rejected),
    }


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _import_batch(
    batch: list[ImportedLine], add: Callable[[Sequence[object]], Sequence[ItemOutcome]], report: ImportReport
) -> None:
    if not batch:
        return
    outcomes = add([with_id(line.item or {}) for line in batch])
    for line, outcome in zip(batch, outcomes, strict=True):
        if outcome.status == "accepted":
            report.num_accepted += 1
        elif outcome.status == "duplicate":
            report.num_duplicates += 1
        else:
            _note_error(report, line.line_number, outcome.message or "", outcome.param)


def _note_error(report: ImportReport, line_number: int, message: str, param: str | None) -> None:
    report.num_errors += 1
    if len(report.errors) < MAX_REPORTED_ERRORS:
        report.errors.append(LineError(line_number, message, param))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
