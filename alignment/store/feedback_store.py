"""The feedback store: what users said, the pairs made of it, and what training did with them, each a part of its own.

Guarantees. `FeedbackLog.add` returns only after its transaction is on disk (SQLite: WAL with synchronous=FULL). Any
failure of the database is a `StoreUnavailableError`. All methods may be called from several threads, and several
processes may share one database. Every method but the counts costs about the same with a hundred pairs and with a
million (docs/measurements/feedback.md).
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.engine import URL, Connection

from alignment.drift.streams import DriftEvent
from alignment.records.json_checks import canonical_json, is_storable
from alignment.store.database import Database, Part, open_engine, reads, writes
from alignment.store.feedback_log import FeedbackLog
from alignment.store.migrations import prepare_tables
from alignment.store.models import ModelMemory
from alignment.store.pair_matches import PairMatches
from alignment.store.pair_sampling import PairSampling
from alignment.store.pairs import PairStore
from alignment.store.responses import ResponseStore
from alignment.store.schema import drift_events, loop_state
from core.alignment_config import FeedbackConfig
from core.errors import StoreUnavailableError
from core.files import make_directory

MAX_EVENTS = 100_000
"""Drift events kept, about; the oldest are dropped first."""


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """Sizes, for status pages and metrics."""

    feedback: dict[str, int]
    """Items by type."""
    pairs: dict[str, int]
    """See `PairStore.counts`."""
    responses: int


class FeedbackStore:
    """All parts of the store on one database."""

    def __init__(self, database: Database, config: FeedbackConfig) -> None:
        self.database = database
        self.feedback = FeedbackLog(database, config)
        self.responses = ResponseStore(database, config.max_responses)
        self.pairs = PairStore(database)
        self.sampling = PairSampling(database)
        self.matches = PairMatches(database)
        self.loop = LoopStore(database)
        self.models = ModelMemory(database)

    @classmethod
    def open(
        cls, config: FeedbackConfig, state_dir: Path, clock: Callable[[], float] = time.time
    ) -> "FeedbackStore":
        """Open or create the store; `clock` gives Unix seconds.

        Raises:
            ConfigError: `database_url` cannot be used, or a newer MACE wrote the database.
            StoreUnavailableError: the database cannot be reached or written.
        """
        database = Database(open_engine(config.database_url or _local_url(state_dir)), clock)
        try:
            database.write(prepare_tables)
        except BaseException:
            database.close()
            raise
        return cls(database, config)

    def close(self) -> None:
        """Give all connections back. A later call opens new ones."""
        self.database.close()

    def counts(self) -> StoreCounts:
        """All sizes; walks indexes, so call it every few seconds at most."""
        return StoreCounts(self.feedback.counts(), self.pairs.counts(), self.responses.count())


class LoopStore(Part):
    """The memory of the alignment loop over a restart: the history of drift, and small states by name."""

    @writes
    def put_drift_events(self, connection: Connection, events: Sequence[DriftEvent]) -> None:
        """Append events, but for those whose value is no number, and drop those that are too old to keep."""
        rows = [asdict(event) for event in events if math.isfinite(event.value)]
        if rows:
            connection.execute(insert(drift_events), rows)
            newest = connection.execute(select(func.max(drift_events.c.seq))).scalar_one()
            connection.execute(delete(drift_events).where(drift_events.c.seq <= newest - MAX_EVENTS))

    @reads
    def drift_events(self, connection: Connection, limit: int, stream: str | None = None) -> list[DriftEvent]:
        """The newest events, of one stream or of all, newest first."""
        columns = (drift_events.c[name] for name in ("at", "stream", "kind", "value", "detail"))
        query = select(*columns).order_by(drift_events.c.seq.desc()).limit(limit)
        if stream is not None and not is_storable(stream):
            return []
        if stream is not None:
            query = query.where(drift_events.c.stream == stream)
        return [DriftEvent(*row) for row in connection.execute(query)]

    @reads
    def load_state(self, connection: Connection, key: str) -> Any | None:
        """The JSON value saved last under `key`; None if there is none."""
        value = connection.execute(select(loop_state.c.value).where(loop_state.c.key == key)).scalar_one_or_none()
        return None if value is None else json.loads(value)

    @writes
    def save_state(self, connection: Connection, key: str, value: object) -> None:
        """Keep a JSON value under `key`, in place of the one before."""
        row = {"value": canonical_json(value), "updated_at": self.database.clock()}
        changed = update(loop_state).where(loop_state.c.key == key).values(**row)
        if connection.execute(changed).rowcount == 0:
            connection.execute(insert(loop_state), {"key": key, **row})


def database_path(state_dir: Path) -> Path:
    """The store's file if no `database_url` is set."""
    return state_dir / "feedback.db"


def _local_url(state_dir: Path) -> URL:
    try:
        make_directory(state_dir)
    except OSError as error:
        raise StoreUnavailableError(f"cannot create {state_dir}: {error}") from error
    return URL.create("sqlite", database=str(database_path(state_dir)))
