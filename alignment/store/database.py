"""The database behind the feedback store: connections, transactions, and every line that knows which kind it is."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Column, Engine, Table, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from core.errors import ConfigError, StoreUnavailableError

T = TypeVar("T")
BUSY_TIMEOUT_S = 5.0
"""How long a writer waits for another process's transaction, which take milliseconds, and for a connection."""
_WRITE_OPTION = "mace_write"
_MAX_RACES = 3


class Database:
    """Transactions on one engine, from any thread. Writers of this process take turns.

    Any failure of the database is a `StoreUnavailableError`, after which the connections are thrown away, so the
    next call starts clean.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writing = threading.Lock()

    def close(self) -> None:
        """Give all connections back. A later call opens new ones."""
        self._engine.dispose()

    def _read(self, work: Callable[[Connection], T]) -> T:
        with _named_errors(self._engine), self._engine.connect() as connection, connection.begin():
            return work(connection)

    def _write(self, work: Callable[[Connection], T]) -> T:
        with self._writing, _named_errors(self._engine):
            for _ in range(_MAX_RACES):
                try:
                    return self._write_once(work)
                except SQLAlchemyError as error:
                    if not _lost_a_race(error):
                        raise
            return self._write_once(work)

    def _write_once(self, work: Callable[[Connection], T]) -> T:
        with self._engine.execution_options(**{_WRITE_OPTION: True}).begin() as connection:
            return work(connection)


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
    """As patient and as durable as with SQLite: whatever the server's defaults are, 2xx means on disk."""
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
    if connection.dialect.name == "postgresql":
        safe = postgresql.insert(table).on_conflict_do_nothing().returning(returning)
        return set(connection.execute(safe, rows).scalars())
    statement = sqlite.insert(table).on_conflict_do_nothing().returning(returning)
    return set(connection.execute(statement, rows).scalars())


def _lost_a_race(error: SQLAlchemyError) -> bool:
    """Did PostgreSQL roll the transaction back only because of another one, so that repeating it is right?

    Serialization failure, deadlock, and the unique violation that two processes creating the tables can see; all
    inserts of ours that may collide use `insert_new`. SQLite has one writer and no such errors.
    """
    cause = getattr(error, "orig", None)
    code = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    return code in ("40001", "40P01", "23505")


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver would delay BEGIN until the first write
    connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _prepare_postgres(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        cursor.execute("SET synchronous_commit = on")
    connection.commit()


def _begin_sqlite(connection: Connection) -> None:
    """Writers take the lock first: a transaction that reads and then writes may fail to get it later."""
    writes = connection.get_execution_options().get(_WRITE_OPTION, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _named_errors(engine: Engine) -> Iterator[None]:
    """Foreign errors end here. The message keeps the driver's words and drops SQL and parameters: users' texts."""
    try:
        yield
    except SQLAlchemyError as error:
        engine.dispose()
        cause = getattr(error, "orig", None) or error
        raise StoreUnavailableError(f"the feedback store is unavailable: {str(cause).splitlines()[0]}") from error
