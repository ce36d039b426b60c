"""Sources of an import: rows with numbers, and an identity that changes when the data do."""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import httpx

from alignment.records.json_checks import unique_object
from alignment.records.lines import BLANK, decode_line, whole_problem, whole_problem_of_lines
from core.errors import InvalidFeedbackError, MaceError

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
_SUFFIXES = (*_TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES), ".parquet")
_BOM = b"\xef\xbb\xbf"
_START_BYTES = 4096
_CHUNK_CHARS = 1 << 20
_MAX_ITEM_CHARS = 64 << 20
"""A JSON value or a line that is longer is not a preference; looking for its end would fill the memory."""
_READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error)
_BETWEEN_ITEMS = re.compile(r"[\s,]*")
_READ_ROWS = 1000
_HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_DEFAULT_SPLIT = "train"

_Decoded = tuple[int, object, InvalidFeedbackError | None]
"""Number, value, and why the value could not be decoded."""


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


@dataclass(frozen=True, slots=True)
class Source:
    """Something to import from."""

    label: str
    """Name for people."""
    identity: str
    """The same for the same data, another if they changed."""
    total: int | None
    """Size, in the unit of `SourceRow.done`; None if it is unknown."""
    rows: Callable[[int], Iterator[SourceRow]]
    """Rows with numbers above the given one, in order, a bounded number of them in memory.

    Raises a SourceError if the data cannot be read (any further).
    """


def _text_rows(path: Path, after: int) -> Iterator[SourceRow]:
    """Rows of a JSONL, JSON or CSV file; `done` counts bytes."""
    names = [suffix.lower() for suffix in path.suffixes]
    kind = next(name for name in reversed(names) if name != ".gz")
    try:
        with path.open("rb") as raw:
            plain = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if names[-1] == ".gz" else raw
            start = plain.read1(_START_BYTES)  # type: ignore[attr-defined]  # what can be read of a file cut short
            plain.seek(0)
            is_array = kind == ".json" and start.removeprefix(_BOM).lstrip().startswith(b"[")
            find_problem = whole_problem if kind == ".csv" or is_array else whole_problem_of_lines
            if problem := find_problem(start):
                raise SourceError(f"cannot read {path}: {problem}")
            if kind == ".csv":
                decoded = _read_csv(plain)
            else:
                decoded = _read_array(plain) if is_array else _read_lines(plain, after)
            for number, value, error in decoded:
                if number > after:
                    yield SourceRow(number, value, raw.tell(), error)
    except UnicodeDecodeError as error:
        raise SourceError(f"cannot read {path}: the data are not UTF-8; `iconv -t UTF-8` converts them") from error
    except _READ_ERRORS as error:
        raise SourceError(f"cannot read {path}: {error}") from error


def _read_lines(file: IO[bytes], after: int) -> Iterator[_Decoded]:
    """Lines that end in LF, CR LF or CR alone; bytes that are no UTF-8 are refused with their line."""
    text, number = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape"), 0
    while escaped := text.readline(_MAX_ITEM_CHARS):
        line = escaped.encode(errors="surrogateescape")
        number += 1
        if len(escaped) == _MAX_ITEM_CHARS:
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


def _read_array(file: IO[bytes]) -> Iterator[_Decoded]:
    """The items of one array, each decoded as soon as it is complete."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    errors: list[InvalidFeedbackError] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        try:
            return unique_object(pairs)
        except InvalidFeedbackError as error:  # kept, for the end of the item has to be found
            errors.append(error)
            return dict(pairs)

    decoder = json.JSONDecoder(object_pairs_hook=unique)
    buffer, number = text.read(_CHUNK_CHARS), 0
    at = buffer.index("[") + 1
    while True:
        at = _BETWEEN_ITEMS.match(buffer, at).end()  # type: ignore[union-attr]  # it matches nothing too
        if buffer.startswith("]", at):
            if (buffer[at + 1 :] + text.read(_CHUNK_CHARS)).strip():
                raise SourceError(f"the data go on behind the end of the JSON array, after item {number}")
            return
        errors.clear()
        value, end = _decode_item(decoder, buffer, at)
        if end < len(buffer):  # else it may go on in the next chunk
            number += 1
            yield number, value, errors[0] if errors else None
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
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        reason = "its first line must name the columns, with commas between them"
        raise SourceError(f"the CSV file has one column, {header[0][:100]!r}: {reason}")
    _refuse_twice(header, "the CSV file")
    for number, record in enumerate((record for record in records if record), start=1):
        row: dict[str, Any] = {name: value or None for name, value in zip(header, record, strict=False)}
        error = None
        if len(record) != len(header):
            error = InvalidFeedbackError(f"the record has {len(record)} values, the header {len(header)}")
        yield number, row, error


def _refuse_twice(columns: list[str], what: str) -> None:
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise SourceError(f"{what} has the column {twice[:100]!r} twice")


def _parquet_rows(path: Path, after: int) -> Iterator[SourceRow]:
    """Rows of a Parquet file; `done` counts rows. Maps become objects, other types stay what Arrow makes of them."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_READ_ROWS):
                skipped = min(max(after - number, 0), batch.num_rows)
                number += skipped
                for value, error in _read_batch(batch.slice(skipped)):
                    number += 1
                    yield SourceRow(number, _without_nulls(value), number, error)
    except _foreign_errors() as error:
        raise SourceError(f"cannot read {path} behind row {number}: {_first_line(error)}") from error


def _without_nulls(value: Any) -> Any:
    """Objects without their null members: Arrow gives every struct of a column all members that any of them has."""
    if isinstance(value, dict):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    return [_without_nulls(child) for child in value] if isinstance(value, list) else value


def _read_batch(batch: Any) -> Iterator[tuple[object, InvalidFeedbackError | None]]:
    """Rows of an Arrow batch; one by one if it holds what Python cannot: a key twice in a map, the year 10,000."""
    errors = _foreign_errors()
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
        yield from ((row, None) for row in rows)
    except errors:
        for cells in zip(*batch.columns, strict=True):
            row, problem = {}, None
            for name, cell in zip(batch.schema.names, cells, strict=True):
                try:
                    row[name] = cell.as_py(maps_as_pydicts="strict")
                except errors as error:
                    problem = InvalidFeedbackError(f"{name} cannot be read: {_first_line(error)}", name)
            yield row, problem


def _table_rows(table: Any, label: str, after: int) -> Iterator[SourceRow]:
    """Rows of a `datasets.Dataset` (memory-mapped) or `IterableDataset` (streamed); `done` counts rows."""
    number = after
    try:
        for batch in table.with_format(None).skip(after).iter(batch_size=_READ_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield SourceRow(number, _without_nulls(dict(zip(batch, values, strict=True))), number)
    except _foreign_errors() as error:
        raise SourceError(f"cannot read {label} behind row {number}: {_first_line(error)}") from error


def _open_saved(path: Path, split: str | None) -> Source:
    """A directory that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except _foreign_errors() as error:
        raise SourceError(f"{path} is no data set saved with save_to_disk: {_first_line(error)}") from error
    if isinstance(saved, Dataset):
        own = str(saved.split) if saved.split else None
        if split is not None and own not in (None, split):
            raise SourceError(f"{path} is the split {own!r}, not {split!r}")
        table = saved
    else:
        table = _pick(saved, split, str(path))
    fingerprint = table._fingerprint  # noqa: SLF001 - `datasets` has no other name for a table's content
    identity = f"{path.resolve()} {table.split} {fingerprint} {table.num_rows}"
    return Source(path.name, identity, table.num_rows, partial(_table_rows, table, path.name))


def _open_file(path: Path) -> Source:
    """A file of one of `_SUFFIXES`; Parquet is streamed."""
    stat, resolved = path.stat(), path.resolve()
    identity = f"{resolved} {stat.st_size} {stat.st_mtime_ns}"
    if not path.name.lower().endswith(".parquet"):
        return Source(path.name, identity, stat.st_size, partial(_text_rows, resolved))
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            num_rows, names = file.metadata.num_rows, file.schema_arrow.names
    except _foreign_errors() as error:
        raise SourceError(f"cannot read {path}: {_first_line(error)}") from error
    _refuse_twice(names, str(path))
    return Source(path.name, identity, num_rows, partial(_parquet_rows, resolved))


def _open_hub(name: str, split: str, config: str | None, streaming: bool) -> Source:
    """A data set of the Hugging Face hub, or of its local cache if the hub cannot be reached."""
    unreachable = _hub_is_unreachable()
    if unreachable:  # read when these libraries are imported: what is cached is found without minutes of retries
        os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import load_dataset

    try:
        table = load_dataset(name, config, split=split, streaming=streaming)
    except _foreign_errors() as error:
        reason = f"the hub cannot be reached ({unreachable}) and it is not cached" if unreachable else None
        raise SourceError(f"cannot load {name}: {reason or _first_line(error)}") from error
    total = None if streaming else table.num_rows
    version = "" if streaming else table._fingerprint  # noqa: SLF001 - as in `_open_saved`
    return Source(name, f"hub {name} {config} {split} {version}", total, partial(_table_rows, table, name))


def _pick(splits: Mapping[str, Any], split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if (split or _DEFAULT_SPLIT) in splits:
        return splits[split or _DEFAULT_SPLIT]
    raise SourceError(
        f"{name} has no split {split or _DEFAULT_SPLIT!r}; choose one with --split: {', '.join(splits)}"
    )


def _hub_is_unreachable() -> str | None:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        httpx.head(endpoint, timeout=_HUB_TIMEOUT_S)
    except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
        return f"{endpoint}: {_first_line(error)}"
    return None


def _foreign_errors() -> tuple[type[Exception], ...]:
    """Errors that `datasets`, Arrow and the hub client raise for data that are missing, damaged or out of reach."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    of_python = (OSError, ValueError, RuntimeError, KeyError, TypeError, OverflowError)
    return (*of_python, httpx.HTTPError, pyarrow.ArrowException, DatasetsError)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def open_source(name: str, split: str | None = None, config: str | None = None, streaming: bool = False) -> Source:
    """A file, a directory of `save_to_disk`, or an id of the Hugging Face hub: whichever `name` is.

    Args:
        name: what exists on this machine comes before the hub.
        split: of a saved or hub data set; default is `train`, or the only one there is.
        config: configuration of a hub data set.
        streaming: read a hub data set while it is fetched, and keep nothing.

    Raises:
        SourceError: there is no such thing, or it cannot be read.
    """
    path = Path(name).expanduser()
    lower = path.name.lower()
    if path.is_dir():
        return _open_saved(path, split)
    if path.is_file():
        if lower.endswith(_SUFFIXES):
            return _open_file(path)
        raise SourceError(f"{name}: the suffix must be one of {', '.join(_SUFFIXES)}")
    if lower.endswith(_SUFFIXES) or not _HUB_ID.fullmatch(name):
        raise SourceError(f"there is no file or directory {name}, and an id of the hub looks like owner/name")
    return _open_hub(name, split or _DEFAULT_SPLIT, config, streaming)
