"""The database behind the feedback store: connections, transactions, and every line that knows which kind it is.

A part of the store is a `Part`; its methods that `reads` or `writes` decorates run in a transaction of their own, whose
connection is their first argument. Any failure of the database is a `StoreUnavailableError`, after which the
connections are thrown away, so the next call starts clean. Writes of several threads share one transaction, and so one
flush of the disk (`GroupCommit`).
"""

import functools
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from sqlalchemy import Column, Engine, Table, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
    SQLAlchemyError,
)

from core.errors import ConfigError, StoreUnavailableError

T = TypeVar("T")
P = ParamSpec("P")
PartT = TypeVar("PartT", bound="Part")
Job = TypeVar("Job")
Result = TypeVar("Result")
BUSY_TIMEOUT_S = 5.0
"""Time that a writer waits for another process's transaction, which take milliseconds, and for a connection."""
_WAL_PAUSE_S = 0.01
_WRITE_OPTION = "mace_write"
_MAX_RACES = 3
_ERRORS_OF_ONE = (DataError, IntegrityError, ProgrammingError)
"""Of the database: a statement is wrong, or a value is."""


_CHUNK = 400
"""Values in one IN list; SQLite's oldest limit is 999 parameters."""


class Database:
    """Transactions on one engine, from any thread. Writers of this process take turns. `clock` gives Unix seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self.engine = engine
        self.clock = clock
        self._writes: GroupCommit[Callable[[Connection], Any], Any] = GroupCommit(self._write_all)

    def close(self) -> None:
        """Give all connections back. A later call opens new ones."""
        self.engine.dispose()

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction that takes no write lock."""
        with _named_errors(self.engine), self.engine.connect() as connection, connection.begin():
            return work(connection)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction that is on disk on return, perhaps with other threads' and in one of them.

        It may run several times: see `_lost_a_race`, and `GroupCommit` for what fails beside it.
        """
        result: T = self._writes.submit(work)
        return result

    def _write_all(self, works: Sequence[Callable[[Connection], Any]]) -> list[Any]:
        with _named_errors(self.engine):
            for _ in range(_MAX_RACES):
                try:
                    return self._write_once(works)
                except SQLAlchemyError as error:
                    if not _lost_a_race(error):
                        raise
            return self._write_once(works)

    def _write_once(self, works: Sequence[Callable[[Connection], Any]]) -> list[Any]:
        with self.engine.execution_options(**{_WRITE_OPTION: True}).begin() as connection:
            return [work(connection) for work in works]


class Part:
    """A part of the store: methods on one database."""

    def __init__(self, database: Database) -> None:
        self.database = database


def reads(work: Callable[Concatenate[PartT, Connection, P], T]) -> Callable[Concatenate[PartT, P], T]:
    """Make a method run in a reading transaction of its own."""

    @functools.wraps(work)
    def run(self: PartT, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.database.read(lambda connection: work(self, connection, *args, **kwargs))

    return run


def writes(work: Callable[Concatenate[PartT, Connection, P], T]) -> Callable[Concatenate[PartT, P], T]:
    """Make a method run in a writing transaction of its own, which is on disk when it returns."""

    @functools.wraps(work)
    def run(self: PartT, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.database.write(lambda connection: work(self, connection, *args, **kwargs))

    return run


class GroupCommit(Generic[Job, Result]):
    """Runs `commit`, which is all or nothing, on batches of jobs of several threads, one batch at a time.

    A durable commit costs one flush of the disk (2 to 4 ms on an SSD). Callers that arrive while a commit is running
    wait, and the next one to get its turn writes for all of them. Nobody waits for company: a lone caller commits at
    once.
    """

    def __init__(self, commit: Callable[[Sequence[Job]], Sequence[Result]], max_jobs: int = 64) -> None:
        self._commit = commit
        self._max_jobs = max_jobs
        self._changed = threading.Condition()
        self._leading = False
        self._waiting: list[tuple[Job, Future[Result]]] = []

    def submit(self, job: Job) -> Result:
        """Return when `job` is committed; raise what `commit` raised for it."""
        future: Future[Result] = Future()
        with self._changed:
            self._waiting.append((job, future))
        while not future.done():
            with self._changed:
                self._changed.wait_for(lambda: future.done() or not self._leading)
                if future.done():
                    break
                self._leading = True
                batch = self._waiting[: self._max_jobs]
                del self._waiting[: self._max_jobs]
            try:
                self._run(batch)
            finally:
                with self._changed:  # undone ones: KeyboardInterrupt or the like; the next leader takes them
                    self._waiting[:0] = [one for one in batch if not one[1].done()]
                    self._leading = False
                    self._changed.notify_all()
        return future.result()

    def _run(self, batch: list[tuple[Job, Future[Result]]]) -> None:
        try:
            results = self._commit([job for job, _ in batch])
        except Exception as error:  # noqa: BLE001 - it belongs to the callers, who get it from `submit`
            is_theirs = len(batch) == 1 or _store_is_away(error)
            for one in batch:
                if is_theirs:
                    one[1].set_exception(error)
                else:  # one bad job must not fail the others
                    self._run([one])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)


def _store_is_away(error: Exception) -> bool:
    """The store failed, and not what one job asked of it."""
    return isinstance(error, StoreUnavailableError) and not isinstance(error.__cause__, _ERRORS_OF_ONE)


def open_engine(url: str | URL) -> Engine:
    """An engine whose SQLite connections are durable (WAL, synchronous=FULL) and begin transactions explicitly.

    Raises:
        ConfigError: the URL is malformed, needs a driver that is not installed, or would keep nothing.
    """
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise ConfigError(
                "feedback.database_url is an in-memory database, which would lose acknowledged feedback"
            )
        if parsed.get_backend_name() != "sqlite":
            return _open_server(parsed)
        engine = create_engine(parsed, pool_timeout=BUSY_TIMEOUT_S)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise ConfigError(f"feedback.database_url cannot be used: {error}") from error
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _open_server(url: URL) -> Engine:
    """An engine as patient and as durable as SQLite's: whatever the server's defaults are, 2xx means on disk."""
    if url.get_backend_name() == "postgresql" and "connect_timeout" not in url.query:
        url = url.update_query_dict({"connect_timeout": str(round(BUSY_TIMEOUT_S))})
    engine = create_engine(url, pool_pre_ping=True, pool_timeout=BUSY_TIMEOUT_S)
    if url.get_backend_name() == "postgresql":
        event.listen(engine, "connect", _prepare_postgres)
    return engine


def insert_new(
    connection: Connection, table: Table, rows: list[dict[str, Any]], returning: Column[Any]
) -> set[Any]:
    """Insert the rows that violate no UNIQUE constraint and return their `returning` values.

    SQL has no portable word for this; both databases share the ON CONFLICT clause.
    """
    if not rows:
        return set()
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(table).on_conflict_do_nothing().returning(returning)
    return set(connection.execute(statement, rows).scalars())


def chunked(values: Iterable[Any]) -> Iterator[list[Any]]:
    """`values` in lists that fit into one IN list."""
    rest = iter(values)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


def ordered_json(value: object) -> str:
    """A JSON value as text. Keys keep their order: chat templates print it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def encoded(value: object) -> str | None:
    """A JSON value as a column holds it; what is empty is null."""
    return ordered_json(value) if value else None


def decoded(text: str | None) -> Any:
    """The JSON value of a column; None for null."""
    return None if text is None else json.loads(text)


def decoded_ids(text: str | None) -> tuple[int, ...] | None:
    """The token ids of a column; None for null."""
    return None if text is None else tuple(json.loads(text))


def _lost_a_race(error: SQLAlchemyError) -> bool:
    """True if PostgreSQL rolled the transaction back only because of another one, so that repeating it is right.

    Serialization failure, deadlock, and the unique violation that two processes creating the tables can see; all
    inserts of ours that may collide use `insert_new`. SQLite has one writer and no such errors.
    """
    cause = getattr(error, "orig", None)
    code = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    return code in ("40001", "40P01", "23505")


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver would delay BEGIN until the first write
    connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    _turn_on_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")


def _turn_on_wal(connection: Any) -> None:
    """Wait for another process that reads, writes or does the same: SQLite's busy timeout leaves this statement out."""
    give_up_s = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_s:
                raise
            time.sleep(_WAL_PAUSE_S)


def _prepare_postgres(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        cursor.execute("SET synchronous_commit = on")
    connection.commit()


def _begin_sqlite(connection: Connection) -> None:
    """Let writers take the lock first: a transaction that reads and then writes may fail to get it later."""
    writes = connection.get_execution_options().get(_WRITE_OPTION, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _named_errors(engine: Engine) -> Iterator[None]:
    """Name foreign errors. The message keeps the driver's words and drops SQL and parameters: users' texts."""
    try:
        yield
    except SQLAlchemyError as error:
        engine.dispose()
        cause = getattr(error, "orig", None) or error
        raise StoreUnavailableError(f"the feedback store is unavailable: {str(cause).splitlines()[0]}") from error
