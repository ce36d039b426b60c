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
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

from pydantic import TypeAdapter

from alignment.records.row_formats import to_api_row
from alignment.store.formats import note_dropped, with_id
from app.importing.delivery import Delivered, Sink
from app.importing.sources import Source, SourceError, SourceRow
from core.errors import InvalidFeedbackError

T = TypeVar("T")
_MAX_REASONS = 100
_OTHER = "other reasons"
_DETAIL = re.compile(r"\d+|'[^']*'")
"""Matches the details in which two refusals for the same reason differ: sizes, places, quoted names."""
_BATCH_ROWS = 500
_BATCH_BYTES = 2 << 20
"""A quarter of what a server takes by default (`feedback.max_body_bytes`)."""
_BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one row was refused."""

    row: int
    reason: str
    param: str | None
    value: object
    """The row as it stands in the source."""


@dataclass
class Reason:
    """One kind of refusal. The example is the first of them."""

    count: int
    first_row: int
    example: str
    param: str | None


@dataclass
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
        note_dropped(self.dropped_columns, dropped)

    def refuse(self, refusal: Refusal) -> None:
        """Count a refused row under its reason."""
        self.num_rejected += 1
        key = _DETAIL.sub("…", refusal.reason)
        if key not in self.reasons and len(self.reasons) >= _MAX_REASONS:
            key = _OTHER
        first = Reason(0, refusal.row, refusal.reason, refusal.param)
        self.reasons.setdefault(key, first).count += 1


@dataclass
class Progress:
    """Rows 1 to `next_after` are settled: committed by the server, or refused."""

    next_after: int = 0
    last_id: str | None = None
    """Id of the last committed record. A server that does not know it is not the one that we sent it to."""
    rejected_file: str | None = None
    rejected_bytes: int = 0
    """Size of the file of rejected rows then; what is behind that belongs to rows that were not settled."""
    tally: Tally = field(default_factory=Tally)


_PROGRESS = TypeAdapter(Progress)


class ProgressFile:
    """One file for each source, server and set of options."""

    def __init__(self, *key: str) -> None:
        digest = hashlib.sha256("\n".join(key).encode(errors="surrogatepass")).hexdigest()
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = Path(cache) / "mace" / "imports" / f"{digest[:32]}.json"

    def load(self) -> Progress | None:
        """Progress of an earlier run; None if there was none, or its file is damaged."""
        try:
            return _PROGRESS.validate_python(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def save(self, progress: Progress) -> None:
        """Replace what was saved before. It is not flushed to the disk: rows that are sent again add nothing.

        Raises:
            OSError: the cache directory cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(progress, default=vars), encoding="utf-8")
        partial.replace(self.path)

    def remove(self) -> None:
        """Forget; also if there is nothing to forget."""
        self.path.unlink(missing_ok=True)


def _read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Iterate over `items`, up to `_BATCHES_AHEAD` of them taken by another thread before they are asked for.

    The thread is a daemon and only reads: Ctrl-C in the consumer ends the program at once.
    """
    ready: queue.Queue[tuple[list[T], BaseException | None]] = queue.Queue(_BATCHES_AHEAD)

    def read() -> None:
        end: BaseException = StopIteration()
        try:
            for item in items:
                ready.put(([item], None))
        except BaseException as error:  # noqa: BLE001 - it belongs to the consumer
            end = error
        ready.put(([], end))

    threading.Thread(target=read, name="read-ahead", daemon=True).start()
    while True:
        item, end = ready.get()
        yield from item
        if isinstance(end, StopIteration):
            return
        if end is not None:
            raise end


@dataclass(slots=True)
class _Batch:
    """Rows that are settled together."""

    lines: list[bytes] = field(default_factory=list)
    taken: list[tuple[SourceRow, str | None]] = field(default_factory=list)
    """For each of `lines` the row that it was made from, and the record's id."""
    formats: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    num_bytes: int = 0
    last: SourceRow | None = None

    @property
    def is_full(self) -> bool:
        return len(self.lines) + len(self.refusals) >= _BATCH_ROWS or self.num_bytes >= _BATCH_BYTES


@dataclass(eq=False, repr=False)
class Importer:
    """Imports one source into one sink."""

    source: Source
    sink: Sink
    _: KW_ONLY
    chat: bool = False
    """See `to_api_row`."""
    limit: int | None = None
    """Settle this many rows of the source at most, those of earlier runs included."""
    rejected: Path | None = None
    """File for refused rows as JSON lines; None: they are only counted."""
    progress_file: ProgressFile | None = None
    on_settled: Callable[[Progress, int], None] = lambda *_: None
    """Called after each batch with the progress and how far reading is, in the source's unit."""
    progress: Progress = field(default_factory=Progress, init=False)

    def resume(self) -> bool:
        """Go on where an earlier run stopped, if there was one and this server has what that one sent."""
        found = self.progress_file.load() if self.progress_file else None
        if found is None or (found.last_id is not None and not self.sink.knows(found.last_id)):
            return False
        self.progress = found
        return True

    def run(self) -> Progress:
        """Import everything that is not settled yet; afterwards there is nothing left to resume.

        Raises:
            SourceError, DeliveryError, OSError: `progress` says how far it came.
        """
        with self._open_rejected(self.rejected) if self.rejected else nullcontext() as rejected:
            for batch in _read_ahead(self._batches()):
                delivered = self.sink.send(batch.lines) if batch.lines else Delivered(0, 0, [])
                self._settle(batch, delivered, rejected)
        if self.progress_file and self.limit is None:
            self.progress_file.remove()
        return self.progress

    def _batches(self) -> Iterator[_Batch]:
        rows = self.source.rows(self.progress.next_after)
        if self.limit is not None:
            rows = islice(rows, max(0, self.limit - self.progress.tally.num_rows))
        batch, damage = _Batch(), None
        try:
            for row in rows:
                self._convert(row, batch)
                if batch.is_full:
                    yield batch
                    batch = _Batch()
        except SourceError as error:  # what could be read before the damage is taken
            damage = error
        if batch.last:
            yield batch
        if damage:
            raise damage

    def _convert(self, row: SourceRow, batch: _Batch) -> None:
        batch.last = row
        try:
            if row.error is not None:
                raise row.error
            if not isinstance(row.value, dict):
                raise InvalidFeedbackError("the row is not a JSON object")
            converted = to_api_row(row.value, self.chat)
            item = with_id(converted.item)
            line = json.dumps(item, allow_nan=False).encode()
        except InvalidFeedbackError as error:
            batch.refusals.append(Refusal(row.number, str(error), error.param, row.value))
        except (TypeError, ValueError, RecursionError) as error:
            reason = f"the row cannot be written as JSON: {error}"
            batch.refusals.append(Refusal(row.number, reason, None, row.value))
        else:
            batch.lines.append(line)
            batch.taken.append((row, item.get("id")))
            batch.formats.append((converted.format, converted.dropped))
            batch.num_bytes += len(line)

    def _settle(self, batch: _Batch, delivered: Delivered, rejected: IO[bytes] | None) -> None:
        progress, tally = self.progress, self.progress.tally
        assert batch.last is not None
        tally.num_rows += len(batch.lines) + len(batch.refusals)
        refused = {refusal.index for refusal in delivered.refusals}
        for refusal in delivered.refusals:
            row, _ = batch.taken[refusal.index]
            batch.refusals.append(Refusal(row.number, refusal.reason, refusal.param, row.value))
        batch.refusals.sort(key=lambda refusal: refusal.row)
        for name, dropped in batch.formats:
            tally.note_format(name, dropped)
        for one in batch.refusals:
            tally.refuse(one)
        tally.num_accepted += delivered.num_accepted
        tally.num_duplicates += delivered.num_duplicates
        progress.next_after = batch.last.number
        committed = [known for index, (_, known) in enumerate(batch.taken) if index not in refused]
        progress.last_id = committed[-1] if committed else progress.last_id
        if rejected is not None:
            rejected.write(b"".join(_rejected_line(one) for one in batch.refusals))
            rejected.flush()
            progress.rejected_bytes = rejected.tell()
        if self.progress_file:
            self.progress_file.save(progress)
        self.on_settled(progress, batch.last.done)

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
