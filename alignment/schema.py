"""The tables of the feedback store, and every line that knows which database is behind them.

JSON is stored as text, so SQLite and PostgreSQL behave alike. Rows of `pairs` are never rewritten but for their
training state. Sequence numbers (`seq`) are never reused, so that cursors stay valid after deletions.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from core.errors import ConfigError

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5.0
"""How long a SQLite writer waits for another process's transaction, which take milliseconds."""
WRITE_OPTION = "mace_write"

metadata = MetaData()


def _seq() -> Column[int]:
    return Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)


meta = Table("meta", metadata, Column("key", String(100), primary_key=True), Column("value", Text, nullable=False))

feedback = Table(
    "feedback",
    metadata,
    _seq(),
    Column("id", String(255), nullable=False, unique=True),
    Column("idempotency_key", String(300), unique=True),
    Column("fingerprint", String(64), nullable=False),
    Column("type", String(20), nullable=False),
    Column("user_id", String(255)),
    Column("raw", Text, nullable=False),
    Column("pair_id", String(64), index=True),
    Column("created_at", Double, nullable=False),
    Column("received_at", Double, nullable=False),
    Index("ix_feedback_type_seq", "type", "seq"),
    sqlite_autoincrement=True,
)

pairs = Table(
    "pairs",
    metadata,
    _seq(),
    Column("pair_id", String(64), nullable=False, unique=True),
    Column("origin", String(20), nullable=False),
    Column("user_id", String(255)),
    Column("prompt", Text, nullable=False),
    Column("prompt_key", String(64), nullable=False),
    Column("chosen", Text, nullable=False),
    Column("rejected", Text, nullable=False),
    Column("chosen_version", String(255)),
    Column("rejected_version", String(255)),
    Column("weight", Double, nullable=False),
    Column("split", String(10), nullable=False),
    Column("state", String(10), nullable=False),
    Column("park_reason", Text),
    Column("times_trained", Integer, nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("scored", Boolean, nullable=False, default=False),
    Column("scored_version", String(255)),
    Column("last_loss", Double),
    Column("last_margin", Double),
    Column("created_at", Double, nullable=False),
    sqlite_autoincrement=True,
)
# Each index is the whole WHERE and ORDER BY of one query in alignment/pair_store.py.
Index("ix_pairs_next", pairs.c.split, pairs.c.state, pairs.c.times_trained, pairs.c.seq.desc())
Index("ix_pairs_recent", pairs.c.split, pairs.c.state, pairs.c.seq)
Index("ix_pairs_unscored", pairs.c.scored, pairs.c.state, pairs.c.seq)

ratings = Table(
    "ratings",
    metadata,
    _seq(),
    Column("feedback_id", String(255), nullable=False, unique=True),
    Column("response_id", String(255), nullable=False),
    Column("choice_index", Integer, nullable=False),
    Column("direction", Integer, nullable=False),
    Column("user_id", String(255), nullable=False),  # "" is nobody in particular: NULLs do not compare
    Column("prompt", Text, nullable=False),
    Column("prompt_key", String(64), nullable=False),
    Column("text", Text, nullable=False),
    Column("text_key", String(64), nullable=False),
    Column("adapter", String(255)),
    Column("state", String(12), nullable=False),
    Column("pair_id", String(64), index=True),
    Column("received_at", Double, nullable=False),
    Index("ix_ratings_partner", "prompt_key", "user_id", "direction", "state", "seq"),
    Index("ix_ratings_response", "response_id", "choice_index", "user_id"),
    sqlite_autoincrement=True,
)

responses = Table(
    "responses",
    metadata,
    _seq(),
    Column("response_id", String(255), nullable=False),
    Column("choice_index", Integer, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("adapter", String(255)),
    Column("model", String(255)),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("response_id", "choice_index"),
    sqlite_autoincrement=True,
)


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
            return create_engine(parsed, pool_pre_ping=True)
        engine = create_engine(parsed, pool_timeout=BUSY_TIMEOUT_S)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise ConfigError(f"feedback.database_url cannot be used: {error}") from error
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
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


def lost_a_race(error: SQLAlchemyError) -> bool:
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


def _begin_sqlite(connection: Connection) -> None:
    """Writers take the lock first: a transaction that reads and then writes may fail to get it later."""
    writes = connection.get_execution_options().get(WRITE_OPTION, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
