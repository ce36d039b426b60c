"""The import itself: read rows, turn them into rows of our API, deliver them batch by batch, remember how far it came.

Rows are settled strictly in order, so that one number says how far an import has come. While a batch is with the
server, the next one is read and converted.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

from alignment.records.row_formats import to_api_row
from alignment.store.formats import with_id
from app.importing.delivery import Delivered, Sink
from app.importing.progress_file import Progress, ProgressFile
from app.importing.read_ahead import ReadAhead
from app.importing.source import Source, SourceRow
from app.importing.tally import Refusal
from core.errors import InvalidFeedbackError

_BATCH_ROWS = 500
_BATCH_BYTES = 2 << 20
"""A quarter of what a server takes by default (`feedback.max_body_bytes`)."""


@dataclass(slots=True)
class _Batch:
    """Rows that are settled together."""

    lines: list[bytes] = field(default_factory=list)
    rows: list[SourceRow] = field(default_factory=list)
    """What `lines` were made of."""
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
