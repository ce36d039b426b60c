"""The import itself: read rows, turn them into rows of our API, deliver them batch by batch, remember how far it came.

Rows are settled strictly in order, so that one number says how far an import has come. While a batch is with the
server, the next one is read and converted.
"""

import hashlib
import json
import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from alignment.records.row_formats import to_api_row
from alignment.store.formats import with_id
from app.importing.delivery import Delivered, Sink
from app.importing.sources import Source, SourceRow
from core.errors import InvalidFeedbackError
from core.files import write_atomically

_MAX_REASONS = 100
_MAX_COLUMNS = 100
_OTHER = "other reasons"
_DETAIL = re.compile(r"\d+|'[^']*'")
"""Matches the details in which two refusals for the same reason differ: sizes, places, quoted names."""


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
        """Read the output of `to_json`.

        Raises:
            TypeError, ValueError, AttributeError: it is something else.
        """
        data = dict(data)
        data["formats"] = Counter(data["formats"])
        data["dropped_columns"] = Counter(data["dropped_columns"])
        data["reasons"] = {key: Reason(**reason) for key, reason in data["reasons"].items()}
        return cls(**data)


@dataclass(slots=True)
class Progress:
    """Rows 1 to `next_after` are settled: committed by the server, or refused."""

    next_after: int = 0
    last_id: str | None = None
    """Id of the last committed record. A server that does not know it is not the one that we sent it to."""
    rejected_file: str | None = None
    rejected_bytes: int = 0
    """Size of the file of rejected rows then; what is behind that belongs to rows that were not settled."""
    tally: Tally = field(default_factory=Tally)


class ProgressFile:
    """One file for each source, server and set of options."""

    def __init__(self, *key: str) -> None:
        digest = hashlib.sha256("\n".join(key).encode(errors="surrogatepass")).hexdigest()
        self.path = _directory() / f"{digest[:32]}.json"

    def load(self) -> Progress | None:
        """Progress of an earlier run; None if there was none, or its file is damaged."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            return Progress(**{**data, "tally": Tally.from_json(data["tally"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def save(self, progress: Progress) -> None:
        """Replace what was saved before.

        Raises:
            OSError: the cache directory cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "next_after": progress.next_after,
            "last_id": progress.last_id,
            "rejected_file": progress.rejected_file,
            "rejected_bytes": progress.rejected_bytes,
            "tally": progress.tally.to_json(),
        }
        write_atomically(self.path, json.dumps(data))

    def remove(self) -> None:
        """Forget; also if there is nothing to forget."""
        self.path.unlink(missing_ok=True)


def _directory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mace" / "imports"


T = TypeVar("T")
_POLL_S = 0.1


class ReadAhead(Generic[T]):
    """Iterates over `items`, at most `depth` of them taken before they are asked for. Use as a context manager.

    The thread is a daemon and only reads, so Ctrl-C in the consumer ends the program at once.
    """

    def __init__(self, items: Iterator[T], depth: int = 2) -> None:
        self._items = items
        self._ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)

    def __enter__(self) -> "ReadAhead[T]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error, is_end = self._ready.get()
            if error is not None:
                raise error
            if is_end:
                return
            yield item  # type: ignore[misc]  # None only beside an error or the end

    def _read(self) -> None:
        try:
            for item in self._items:
                self._put((item, None, False))
                if self._stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - it belongs to the consumer
            self._put((None, error, True))
        else:
            self._put((None, None, True))

    def _put(self, entry: tuple[T | None, BaseException | None, bool]) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(entry, timeout=_POLL_S)
            except queue.Full:
                continue
        return None


_BATCH_ROWS = 500
_BATCH_BYTES = 2 << 20
"""A quarter of what a server takes by default (`feedback.max_body_bytes`)."""


@dataclass(slots=True)
class _Batch:
    """Rows that are settled together."""

    lines: list[bytes] = field(default_factory=list)
    rows: list[SourceRow] = field(default_factory=list)
    """The rows from which `lines` were made."""
    ids: list[str | None] = field(default_factory=list)
    formats: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    num_rows: int = 0
    num_bytes: int = 0
    last: SourceRow | None = None

    @property
    def is_full(self) -> bool:
        return self.num_rows >= _BATCH_ROWS or self.num_bytes >= _BATCH_BYTES


class Importer:
    """Imports one source into one sink.

    Args:
        source: where rows come from.
        sink: where they go.
        chat: see `to_api_row`.
        limit: settle this many rows of the source at most, those of earlier runs included.
        rejected: file for refused rows as JSON lines; None: they are only counted.
        progress_file: where to remember; None: nowhere.
        on_settled: called after each batch with the progress and how far reading is, in the source's unit.
    """

    def __init__(
        self,
        source: Source,
        sink: Sink,
        *,
        chat: bool = False,
        limit: int | None = None,
        rejected: Path | None = None,
        progress_file: ProgressFile | None = None,
        on_settled: Callable[[Progress, int], None] = lambda *_: None,
    ) -> None:
        self._source = source
        self._sink = sink
        self._chat = chat
        self._limit = limit
        self._rejected = rejected
        self._progress_file = progress_file
        self._on_settled = on_settled
        self.progress = Progress()

    def resume(self) -> bool:
        """Go on where an earlier run stopped, if there was one and this server has what that one sent.

        Raises:
            DeliveryError: see `Sink`.
        """
        found = self._progress_file.load() if self._progress_file else None
        if found is None or (found.last_id is not None and not self._sink.knows(found.last_id)):
            return False
        self.progress = found
        return True

    def run(self) -> Progress:
        """Import everything that is not settled yet; afterwards there is nothing left to resume.

        Raises:
            SourceError, DeliveryError, OSError: `progress` says how far it came.
        """
        if self._rejected is None:
            self._deliver(None)
        else:
            with self._open_rejected(self._rejected) as file:
                self._deliver(file)
        if self._progress_file and self._limit is None:
            self._progress_file.remove()
        return self.progress

    def _deliver(self, rejected: IO[bytes] | None) -> None:
        with ReadAhead(self._batches()) as batches:
            for batch in batches:
                delivered = self._sink.send(batch.lines) if batch.lines else Delivered(0, 0, [])
                self._settle(batch, delivered, rejected)

    def _batches(self) -> Iterator[_Batch]:
        rows = self._source.rows(self.progress.next_after)
        if self._limit is not None:
            rows = islice(rows, max(0, self._limit - self.progress.tally.num_rows))
        batch = _Batch()
        for row in rows:
            self._convert(row, batch)
            if batch.is_full:
                yield batch
                batch = _Batch()
        if batch.last:
            yield batch

    def _convert(self, row: SourceRow, batch: _Batch) -> None:
        batch.num_rows += 1
        batch.last = row
        try:
            if row.error is not None:
                raise row.error
            if not isinstance(row.value, dict):
                raise InvalidFeedbackError("the row is not a JSON object")
            converted = to_api_row(row.value, self._chat)
            item = with_id(converted.item)
            line = json.dumps(item, allow_nan=False).encode()
        except InvalidFeedbackError as error:
            batch.refusals.append(Refusal(row.number, str(error), error.param, row.value))
            return
        except (TypeError, ValueError, RecursionError) as error:
            batch.refusals.append(
                Refusal(row.number, f"the row cannot be written as JSON: {error}", None, row.value)
            )
            return
        batch.lines.append(line)
        batch.rows.append(row)
        batch.ids.append(item.get("id"))
        batch.formats.append((converted.format, converted.dropped))
        batch.num_bytes += len(line)

    def _settle(self, batch: _Batch, delivered: Delivered, rejected: IO[bytes] | None) -> None:
        progress, tally = self.progress, self.progress.tally
        assert batch.last is not None
        refused = {refusal.index for refusal in delivered.refusals}
        for refusal in delivered.refusals:
            row = batch.rows[refusal.index]
            batch.refusals.append(Refusal(row.number, refusal.reason, refusal.param, row.value))
        batch.refusals.sort(key=lambda refusal: refusal.row)
        for name, dropped in batch.formats:
            tally.note_format(name, dropped)
        for one in batch.refusals:
            tally.refuse(one)
        tally.num_rows += batch.num_rows
        tally.num_accepted += delivered.num_accepted
        tally.num_duplicates += delivered.num_duplicates
        progress.next_after = batch.last.number
        committed = [known for index, known in enumerate(batch.ids) if index not in refused]
        progress.last_id = committed[-1] if committed else progress.last_id
        if rejected is not None:
            rejected.write(b"".join(_rejected_line(one) for one in batch.refusals))
            rejected.flush()
            progress.rejected_bytes = rejected.tell()
        if self._progress_file:
            self._progress_file.save(progress)
        self._on_settled(progress, batch.last.done)

    def _open_rejected(self, path: Path) -> IO[bytes]:
        """Empty for a new import; for a resumed one, up to what belongs to settled rows."""
        name = str(path.resolve())
        is_same = self.progress.rejected_file == name and path.exists()
        file = path.open("r+b" if is_same else "wb")
        if is_same:
            file.truncate(min(self.progress.rejected_bytes, file.seek(0, 2)))
            file.seek(0, 2)
        self.progress.rejected_file = name
        return file


def _rejected_line(refusal: Refusal) -> bytes:
    data = {"row": refusal.row, "reason": refusal.reason, "param": refusal.param, "data": refusal.value}
    try:
        return json.dumps(data, default=str).encode() + b"\n"
    except (TypeError, ValueError, RecursionError):
        return json.dumps({**data, "data": ascii(refusal.value)[:10_000]}).encode() + b"\n"
