"""Text files: JSON lines (also gzipped), one JSON array, CSV. None is ever read whole."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, cast

from alignment.store.formats import BLANK, decode_line
from app.importing.source import SourceError, SourceRow
from core.errors import InvalidFeedbackError

_CHUNK_CHARS = 1 << 20
_MAX_ITEM_CHARS = 64 << 20
"""A JSON value or a line that is longer is not a preference; looking for its end would fill the memory."""
_READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error)

_Decoded = tuple[int, object, InvalidFeedbackError | None]
"""Number, value, and why the value could not be decoded."""
_BETWEEN_ITEMS = re.compile(r"[\s,]*")


class TextFile:
    """A file of one of the suffixes that `sources` knows."""

    unit: Literal["bytes"] = "bytes"

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        stat = self._path.stat()
        self.label = path.name
        self.total = stat.st_size
        self.identity = f"{self._path} {stat.st_size} {stat.st_mtime_ns}"

    def rows(self, after: int) -> Iterator[SourceRow]:
        """See `Source.rows`."""
        try:
            with self._path.open("rb") as raw:
                for number, value, error in self._read(raw, after):
                    if number > after:
                        yield SourceRow(number, value, raw.tell(), error)
        except _READ_ERRORS as error:
            raise SourceError(f"cannot read {self._path}: {error}") from error

    def _read(self, raw: IO[bytes], after: int) -> Iterator[_Decoded]:
        names = [suffix.lower() for suffix in self._path.suffixes]
        plain = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if names[-1] == ".gz" else raw
        kind = next(name for name in reversed(names) if name != ".gz")
        if kind == ".csv":
            yield from _read_csv(plain)
        elif kind == ".json" and _begins_array(plain):
            yield from _read_array(plain)
        else:
            yield from _read_lines(plain, after)


def _read_lines(file: IO[bytes], after: int) -> Iterator[_Decoded]:
    number = 0
    while line := file.readline(_MAX_ITEM_CHARS):
        number += 1
        if len(line) == _MAX_ITEM_CHARS:
            raise SourceError(f"line {number} is longer than {_MAX_ITEM_CHARS >> 20} MiB; this is no JSONL file")
        if number <= after:
            continue
        try:
            value = decode_line(line)
        except InvalidFeedbackError as error:
            yield number, line.decode(errors="replace").rstrip("\r\n"), error
        else:
            if value is not BLANK:
                yield number, value, None


def _begins_array(file: IO[bytes]) -> bool:
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _read_array(file: IO[bytes]) -> Iterator[_Decoded]:
    """The items of one array, each decoded as soon as it is complete."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    decoder = json.JSONDecoder()
    buffer, number = text.read(_CHUNK_CHARS), 0
    at = buffer.index("[") + 1
    while True:
        at = _BETWEEN_ITEMS.match(buffer, at).end()  # type: ignore[union-attr]  # it matches nothing too
        if buffer.startswith("]", at):
            return
        value, end = _decode_item(decoder, buffer, at)
        if end < len(buffer):  # else it may go on in the next chunk
            number += 1
            yield number, value, None
            at = end
            continue
        rest = len(buffer) - at
        more = text.read(max(_CHUNK_CHARS, rest)) if rest <= _MAX_ITEM_CHARS else ""
        if not more:
            raise SourceError(f"the JSON array breaks off or is damaged behind item {number}")
        buffer, at = buffer[at:] + more, 0


def _decode_item(decoder: json.JSONDecoder, buffer: str, at: int) -> tuple[object, int]:
    """The value that begins at `at` and where it ends; the end of the buffer if it is not complete."""
    try:
        return decoder.raw_decode(buffer, at)
    except (ValueError, RecursionError):
        return None, len(buffer)


def _read_csv(file: IO[bytes]) -> Iterator[_Decoded]:
    """Records below a header line. Every value is text; an empty one is absent."""
    csv.field_size_limit(_MAX_ITEM_CHARS)
    records = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    header = next(records, None)
    if not header:
        raise SourceError("the CSV file is empty; its first line must name the columns")
    for number, record in enumerate((record for record in records if record), start=1):
        row: dict[str, Any] = {name: value or None for name, value in zip(header, record, strict=False)}
        error = None
        if len(record) != len(header):
            error = InvalidFeedbackError(f"the record has {len(record)} values, the header {len(header)}")
        yield number, row, error
