"""The feedback store: what users said, committed before they are thanked.

Guarantees. `add` returns only after its transaction is on disk (SQLite: WAL with synchronous=FULL). An id or an
idempotency key is one record, whoever races for it, by a UNIQUE constraint. Any failure of the database is a
`StoreUnavailableError`, after which the connections are thrown away, so the next call starts clean. All methods
may be called from several threads, and several processes may share one database.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL, Engine

from alignment.records.feedback import FEEDBACK_TYPES, ResponseRef
from alignment.records.pairs import StoredResponse
from alignment.store import feedback_log, pair_rows, pair_store, response_store
from alignment.store.database import open_engine
from alignment.store.feedback_log import FeedbackEntry, FeedbackPage
from alignment.store.formats import ExportFormat, export_row
from alignment.store.group_commit import GroupCommit
from alignment.store.intake import ItemOutcome, Prepared, prepare, write_items
from alignment.store.migrations import prepare_tables
from alignment.store.rating_counts import rating_counts
from alignment.store.training_store import TrainingStore
from core.alignment_config import FeedbackConfig
from core.errors import InvalidFeedbackError, StoreUnavailableError

_EXPORT_CHUNK = 500
_MAX_KEY_CHARS = 200
MAX_PAGE = 1000
"""Items of one page at most; a larger `limit` is taken as this."""


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """Sizes, for status pages and metrics."""

    feedback: dict[str, int]
    """By type."""
    pairs: dict[str, int]
    """train, heldout, parked; trained counts those of any of them that were trained on."""
    responses: int


class FeedbackStore(TrainingStore):
    """Everything users said, the pairs made of it, and what training did with them."""

    def __init__(self, engine: Engine, config: FeedbackConfig, clock: Callable[[], float] = time.time) -> None:
        super().__init__(engine, clock)
        self._config = config
        self._intake = GroupCommit(self._commit_items)
        self._puts_since_trim = config.max_responses

    @classmethod
    def open(
        cls, config: FeedbackConfig, state_dir: Path, clock: Callable[[], float] = time.time
    ) -> "FeedbackStore":
        """Open or create the store; `clock` gives Unix seconds.

        Raises:
            ConfigError: `database_url` cannot be used, or a newer MACE wrote the database.
            StoreUnavailableError: the database cannot be reached or written.
        """
        url = config.database_url or _local_url(state_dir)
        store = cls(open_engine(url), config, clock)
        try:
            store._write(prepare_tables)
        except BaseException:
            store.close()
            raise
        return store

    def add(self, items: Sequence[object], *, idempotency_key: str | None = None) -> list[ItemOutcome]:
        """Take in feedback items (decoded JSON); one outcome per item, committed together before this returns.

        A bad item is an outcome of status "error" and does not stop the others. Item i of a call with an
        idempotency key has the key `"<key>#<i>"`.

        Raises:
            InvalidFeedbackError: more than `max_items` items, or an unusable idempotency key.
            StoreUnavailableError: nothing of this call is stored (or, rarely, all of it, and the acknowledgement
                got lost); repeating it with the same ids is safe.
        """
        if len(items) > self._config.max_items:
            raise InvalidFeedbackError(
                f"{len(items)} items in one call, the limit is {self._config.max_items}", "items"
            )
        keys = _item_keys(idempotency_key, len(items))
        prepared = [prepare(item, key, self._config) for item, key in zip(items, keys, strict=True)]
        if all(one.error for one in prepared):
            return [one.outcome() for one in prepared]
        return self._intake.submit(prepared)

    def get(self, feedback_id: str) -> FeedbackEntry | None:
        """One stored item."""
        return self._read(lambda c: feedback_log.find_entry(c, feedback_id))

    def delete(self, feedback_id: str) -> bool:
        """Forget an item and the pair it made; the partner of a paired rating is open again. False if unknown."""
        return self._write(lambda c: feedback_log.delete_entry(c, feedback_id))

    def page(self, *, after: str | None = None, limit: int = 50, type: str | None = None) -> FeedbackPage:
        """Items in order of arrival, from the one after the id `after`.

        Raises:
            InvalidFeedbackError: `after` is not the id of an item, or `type` is not a feedback type.
        """
        if type is not None and type not in FEEDBACK_TYPES:
            raise InvalidFeedbackError(f"type must be one of {', '.join(FEEDBACK_TYPES)}", "type")
        return self._read(lambda c: feedback_log.read_page(c, after, min(max(limit, 1), MAX_PAGE), type))

    def export(self, format: ExportFormat = "trl") -> Iterator[dict[str, Any]]:
        """All pairs as rows of that format, in order of arrival; a few hundred are in memory at a time."""
        first, position = self.export_chunk(format, 0, _EXPORT_CHUNK)  # here, so that a bad format raises at once
        return self._chain(format, first, position)

    def export_chunk(
        self, format: ExportFormat, after: int, limit: int
    ) -> tuple[list[dict[str, Any]], int | None]:
        """Up to `limit` rows of the export behind position `after` (0: the beginning), and where to go on.

        Raises:
            InvalidFeedbackError: no such format.
        """
        if format not in ("trl", "openai"):
            raise InvalidFeedbackError("format must be 'trl' or 'openai'", "format")
        chunk = self._read(lambda c: pair_rows.pairs_after(c, after, limit))
        return [export_row(pair, format) for _, pair in chunk], chunk[-1][0] if chunk else None

    def put_responses(self, items: Sequence[StoredResponse]) -> int:
        """Remember responses; returns how many are new. Ids or texts that cannot be stored are skipped."""
        stored = self._write(lambda c: response_store.put_responses(c, items, self._clock()))
        self._puts_since_trim += stored
        if self._puts_since_trim > self._config.max_responses // 20:  # keeps at most 5 % too many
            self._puts_since_trim = 0
            self._write(lambda c: response_store.trim_responses(c, self._config.max_responses))
        return stored

    def get_response(self, response_id: str, choice_index: int = 0) -> StoredResponse | None:
        """One choice of a response, if it is still stored."""
        ref = ResponseRef(response_id, choice_index)
        return self._read(lambda c: response_store.find_responses(c, [ref])).get(ref)

    def counts(self) -> StoreCounts:
        """All sizes; walks indexes, so call it every few seconds at most."""
        return self._read(
            lambda c: StoreCounts(
                feedback_log.count_entries(c), pair_store.count_pairs(c), response_store.count_responses(c)
            )
        )

    def rating_counts(self, since_s: float) -> dict[str | None, tuple[int, int]]:
        """Thumbs up and down received since then (Unix seconds), by adapter version; None is the bare base model."""
        return self._read(lambda c: rating_counts(c, since_s))

    def _commit_items(self, jobs: Sequence[list[Prepared]]) -> list[list[ItemOutcome]]:
        batch = [prepared for job in jobs for prepared in job]
        outcomes = iter(self._write(lambda c: write_items(c, batch, self._config, self._clock())))
        return [[next(outcomes) for _ in job] for job in jobs]

    def _chain(
        self, format: ExportFormat, rows: list[dict[str, Any]], position: int | None
    ) -> Iterator[dict[str, Any]]:
        yield from rows
        while position is not None:
            rows, position = self.export_chunk(format, position, _EXPORT_CHUNK)
            yield from rows


def _local_url(state_dir: Path) -> URL:
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailableError(f"cannot create {state_dir}: {error}") from error
    return URL.create("sqlite", database=str(database_path(state_dir)))


def database_path(state_dir: Path) -> Path:
    """Where the store is if no `database_url` is set."""
    return state_dir / "feedback.db"


def _item_keys(key: str | None, num_items: int) -> list[str | None]:
    if key is None:
        return [None] * num_items
    if not 0 < len(key) <= _MAX_KEY_CHARS or not key.isprintable():
        message = f"Idempotency-Key must have 1 to {_MAX_KEY_CHARS} printable characters"
        raise InvalidFeedbackError(message, "Idempotency-Key")
    return [f"{key}#{index}" for index in range(num_items)]
