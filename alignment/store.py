"""The feedback store: what users said, committed before they are thanked.

Guarantees. `add` returns only after its transaction is on disk (SQLite: WAL with synchronous=FULL). An id or an
idempotency key is one record, whoever races for it, by a UNIQUE constraint. Any failure of the database is a
`StoreUnavailableError`, after which the connections are thrown away, so the next call starts clean. All methods
may be called from several threads, and several processes may share one database.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import insert, select
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from alignment import feedback_log, pair_store, response_store
from alignment.feedback_log import FeedbackEntry, FeedbackPage
from alignment.formats import ExportFormat, export_row
from alignment.group_commit import GroupCommit
from alignment.intake import ItemOutcome, Prepared, prepare, write_items
from alignment.pair_store import Backlog, StoredPair
from alignment.pairs import StoredResponse
from alignment.records import FEEDBACK_TYPES, ResponseRef
from alignment.schema import SCHEMA_VERSION, WRITE_OPTION, lost_a_race, meta, metadata, open_engine
from core.config import FeedbackConfig
from core.errors import ConfigError, InvalidFeedbackError, StoreUnavailableError
from core.types import PairScore

T = TypeVar("T")
_EXPORT_CHUNK = 500
_MAX_KEY_CHARS = 200
_MAX_RACES = 3
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


class FeedbackStore:
    """Everything users said, the pairs made of it, and what training did with them."""

    def __init__(self, engine: Engine, config: FeedbackConfig, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._config = config
        self._clock = clock
        self._writing = threading.Lock()
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
        url: str | URL | None = config.database_url
        if url is None:
            try:
                state_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreUnavailableError(f"cannot create {state_dir}: {error}") from error
            url = URL.create("sqlite", database=str(state_dir / "feedback.db"))
        store = cls(open_engine(url), config, clock)
        store._create_tables()
        return store

    def close(self) -> None:
        """Give all connections back. A later call opens new ones."""
        self._engine.dispose()

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
        chunk = self._read(lambda c: pair_store.pairs_after(c, after, limit))
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

    def next_training_pairs(
        self, limit: int, max_epochs: int, *, exclude: Collection[str] = ()
    ) -> list[StoredPair]:
        """Pairs to train on next: least trained first, then newest. `exclude` are the ids now in training."""
        return self._read(lambda c: pair_store.next_training_pairs(c, limit, max_epochs, exclude))

    def held_out_pairs(self, limit: int) -> list[StoredPair]:
        """The gate's test set: the newest held-out pairs, newest first, one for each prompt."""
        return self._read(lambda c: pair_store.newest_pairs(c, "heldout", limit))

    def recent_training_pairs(self, limit: int) -> list[StoredPair]:
        """The newest pairs that may be trained on, newest first, one for each prompt."""
        return self._read(lambda c: pair_store.newest_pairs(c, "train", limit))

    def unscored_pairs(self, limit: int, *, exclude: Collection[str] = ()) -> list[StoredPair]:
        """Pairs of both splits that were never scored, newest first."""
        return self._read(lambda c: pair_store.unscored_pairs(c, limit, exclude))

    def find_pairs(self, pair_ids: Collection[str]) -> list[StoredPair]:
        """The pairs of those ids that exist, oldest first."""
        return self._read(lambda c: pair_store.find_pairs(c, pair_ids))

    def record_scores(self, scores: Sequence[PairScore], version: str | None = None) -> None:
        """Keep the latest loss and margin of each pair; `version` names the adapter that gave them."""
        self._write(lambda c: pair_store.record_scores(c, scores, version))

    def mark_trained(
        self, pair_ids: Collection[str], scores: Sequence[PairScore] = (), version: str | None = None
    ) -> None:
        """One optimizer step used these pairs; `scores` are those of the step."""

        def write(connection: Connection) -> None:
            pair_store.mark_trained(connection, pair_ids)
            pair_store.record_scores(connection, scores, version)

        self._write(write)

    def mark_failed(self, pair_ids: Collection[str], reason: str, max_attempts: int) -> list[str]:
        """A task with these pairs failed; returns the ids that are parked now, after `max_attempts` in a row."""
        return self._write(lambda c: pair_store.mark_failed(c, pair_ids, reason, max_attempts))

    def park(self, pair_id: str, reason: str) -> bool:
        """Never use this pair again. False if it is unknown or parked already."""
        return self._write(lambda c: pair_store.park_pairs(c, [pair_id], reason)) == 1

    def unpark(self, pair_id: str) -> bool:
        """Use a parked pair again. False if it is not parked."""
        return self._write(lambda c: pair_store.unpark_pairs(c, [pair_id])) == 1

    def backlog(self) -> Backlog:
        """Pairs that wait for their first training; reads one index range."""
        return self._read(pair_store.count_backlog)

    def counts(self) -> StoreCounts:
        """All sizes; walks indexes, so call it every few seconds at most."""
        return self._read(
            lambda c: StoreCounts(
                feedback_log.count_entries(c), pair_store.count_pairs(c), response_store.count_responses(c)
            )
        )

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

    def _create_tables(self) -> None:
        def write(connection: Connection) -> str:
            metadata.create_all(connection)
            version = connection.execute(select(meta.c.value).where(meta.c.key == "schema_version")).scalar()
            if version is None:
                connection.execute(insert(meta), {"key": "schema_version", "value": str(SCHEMA_VERSION)})
            return version or str(SCHEMA_VERSION)

        found = self._write(write)
        if found != str(SCHEMA_VERSION):
            raise ConfigError(f"the feedback database has schema {found}, this MACE reads schema {SCHEMA_VERSION}")

    def _read(self, work: Callable[[Connection], T]) -> T:
        with _named_errors(self._engine), self._engine.connect() as connection, connection.begin():
            return work(connection)

    def _write(self, work: Callable[[Connection], T]) -> T:
        with self._writing, _named_errors(self._engine):
            for _ in range(_MAX_RACES):
                try:
                    return self._write_once(work)
                except SQLAlchemyError as error:
                    if not lost_a_race(error):
                        raise
            return self._write_once(work)

    def _write_once(self, work: Callable[[Connection], T]) -> T:
        with self._engine.execution_options(**{WRITE_OPTION: True}).begin() as connection:
            return work(connection)


@contextmanager
def _named_errors(engine: Engine) -> Iterator[None]:
    """Foreign errors end here. The message keeps the driver's words and drops SQL and parameters: users' texts."""
    try:
        yield
    except SQLAlchemyError as error:
        engine.dispose()
        cause = getattr(error, "orig", None) or error
        raise StoreUnavailableError(f"the feedback store is unavailable: {str(cause).splitlines()[0]}") from error


def _item_keys(key: str | None, num_items: int) -> list[str | None]:
    if key is None:
        return [None] * num_items
    if not 0 < len(key) <= _MAX_KEY_CHARS or not key.isprintable():
        message = f"Idempotency-Key must have 1 to {_MAX_KEY_CHARS} printable characters"
        raise InvalidFeedbackError(message, "Idempotency-Key")
    return [f"{key}#{index}" for index in range(num_items)]
