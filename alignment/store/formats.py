"""Preference files: JSON lines in, JSON lines out.

Read: every format of `alignment.records.row_formats`, found line by line, so mixed files work. Written: TRL or OpenAI
rows with nothing but the format's own keys, because other tools refuse or mistrust extra ones.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from alignment.records.json_checks import canonical_json
from alignment.records.lines import BLANK, decode_line
from alignment.records.row_formats import ApiRow, is_literal, to_api_row
from alignment.store.feedback_log import Add
from alignment.store.pairs import PairStore
from core.errors import InvalidFeedbackError
from core.wire import Prompt

ExportFormat = Literal["trl", "openai"]


@dataclass(frozen=True, slots=True)
class LineError:
    """The reason why one line was refused."""

    line_number: int
    message: str
    param: str | None = None


@dataclass(slots=True)
class ImportReport:
    """Counts and errors of an imported file."""

    num_accepted: int = 0
    num_duplicates: int = 0
    num_errors: int = 0
    errors: list[LineError] = field(default_factory=list)
    """The first `MAX_REPORTED_ERRORS` of them."""
    dropped_columns: dict[str, int] = field(default_factory=dict)
    """Columns that say nothing about the pair (scores, ids), with the number of rows that had them."""


_MAX_COLUMNS = 100
MAX_REPORTED_ERRORS = 1000
"""A client that sends at most so many lines at once hears about each of them."""


def read_jsonl(lines: Iterable[str | bytes]) -> Iterator[tuple[int, ApiRow | InvalidFeedbackError]]:
    """Decode line by line: line number and row, or what is wrong with the line. Blank lines are left out.

    Line numbers count from 1, blank lines included, as editors do.
    """
    for number, line in enumerate(lines, start=1):
        try:
            value = decode_line(line)
            if value is BLANK:
                continue
            if not isinstance(value, dict):
                raise InvalidFeedbackError("the line is not a JSON object")
            yield number, to_api_row(value)
        except InvalidFeedbackError as error:
            yield number, error


def import_jsonl(
    lines: Iterable[str | bytes],
    add: Add,
    batch_items: int = 500,
) -> ImportReport:
    """Feed a file into `add` (`FeedbackLog.add`), one transaction per `batch_items` lines.

    Lines without an id get one from their content, so an interrupted import is simply repeated.

    Raises:
        StoreUnavailableError: from `add`; the batches before are stored.
    """
    report = ImportReport()

    def note_error(number: int, message: str, param: str | None) -> None:
        report.num_errors += 1
        if len(report.errors) < MAX_REPORTED_ERRORS:
            report.errors.append(LineError(number, message, param))

    def add_batch() -> None:
        for number, outcome in zip(batch, add(list(batch.values())), strict=True):
            if outcome.status == "error":
                note_error(number, outcome.message or "", outcome.param)
            report.num_accepted += outcome.status == "accepted"
            report.num_duplicates += outcome.status == "duplicate"
        batch.clear()

    batch: dict[int, dict[str, Any]] = {}
    for number, row in read_jsonl(lines):
        if isinstance(row, InvalidFeedbackError):
            note_error(number, str(row), row.param)
            continue
        note_dropped(report.dropped_columns, row.dropped)
        batch[number] = with_id(row.item)
        if len(batch) >= batch_items:
            add_batch()
    add_batch()
    return report


def note_dropped(columns: dict[str, int], dropped: Iterable[str]) -> None:
    """Count the columns that were dropped, up to a hundred different ones."""
    for column in (name.encode(errors="replace").decode() for name in dropped):
        if column in columns or len(columns) < _MAX_COLUMNS:
            columns[column] = columns.get(column, 0) + 1


def with_id(item: dict[str, Any]) -> dict[str, Any]:
    """`item` with an id of its content, unless it has one: the same row is the same record, however often it comes."""
    if item.get("id") is not None:
        return item
    try:
        digest = hashlib.sha256(canonical_json(item).encode()).hexdigest()
    except (TypeError, ValueError, RecursionError):  # will be refused with a better message when it is parsed
        return item
    return {**item, "id": f"import-{digest[:32]}"}


def export_chunk(
    pairs: PairStore, format: ExportFormat, after: int, limit: int
) -> tuple[list[dict[str, Any]], int | None]:
    """Up to `limit` rows of the export behind position `after` (0: the beginning), and where to go on."""
    if format not in ("trl", "openai"):
        raise InvalidFeedbackError("format must be 'trl' or 'openai'", "format")
    chunk = pairs.after(after, limit)
    rows = [
        export_row(
            pair.prompt, pair.chosen, pair.rejected, format, pair.tools, (pair.chosen_calls, pair.rejected_calls)
        )
        for pair in chunk
    ]
    return rows, chunk[-1].seq if chunk else None


def export_row(
    prompt: Prompt,
    chosen: str,
    rejected: str,
    format: ExportFormat,
    tools: list[dict[str, Any]] | None = None,
    calls: tuple[list[dict[str, Any]] | None, list[dict[str, Any]] | None] = (None, None),
) -> dict[str, Any]:
    """One row of a TRL or OpenAI preference file.

    In TRL's, plain text stays text, and chat becomes its conversational form. Text that an import would take for
    something else, such as a transcript, gets the key `type`, so that it comes back as it is. OpenAI's form is chat
    only: a plain-text prompt becomes a user message, which is not undone by an import.
    """
    if format == "trl" and isinstance(prompt, str):
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        return row if is_literal(row) else {"type": "preference", **row}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    better, worse = (
        [{"role": "assistant", "content": text, **({"tool_calls": called} if called else {})}]
        for text, called in zip((chosen, rejected), calls, strict=True)
    )
    offered = {"tools": tools} if tools else {}
    if format == "trl":
        return {"prompt": messages, "chosen": better, "rejected": worse, **offered}
    return {"input": {"messages": messages, **offered}, "preferred_output": better, "non_preferred_output": worse}
