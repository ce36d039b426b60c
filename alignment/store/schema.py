"""The tables of the feedback store.

JSON is stored as text, so SQLite and PostgreSQL behave alike. What a user said is never rewritten, only what training
and the quality checks made of it. Sequence numbers (`seq`) are never reused: cursors stay valid after deletions.

To change a table here, raise `SCHEMA_VERSION` and write the step from the version before in
`alignment/store/migrations.py`; a test compares the result with a new database. New tables need no step.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.sql.elements import TextClause

SCHEMA_VERSION = 3

metadata = MetaData()

ESCAPE = "\x1a"


class AnyText(TypeDecorator[str]):
    """Text with any character in it. PostgreSQL holds no NUL: it becomes ESCAPE and 0, and ESCAPE becomes itself and 1.

    Text of JSON needs none of this: JSON writes control characters as `\\u0000`.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, _: object) -> str | None:  # noqa: D102
        return value and value.replace(ESCAPE, ESCAPE + "1").replace("\0", ESCAPE + "0")

    def process_result_value(self, value: str | None, _: object) -> str | None:  # noqa: D102
        return value and value.replace(ESCAPE + "0", "\0").replace(ESCAPE + "1", ESCAPE)


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
    Column("prompt_key", String(64), nullable=False),
    Column("pair_key", String(64), nullable=False),
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
    Column("scored_at", Double),
    Column("last_loss", Double),
    Column("last_margin", Double),
    Column("reference_key", String(64)),
    Column("reference_chosen_logp", Double),
    Column("reference_rejected_logp", Double),
    Column("quality", Double, nullable=False, server_default=text("1")),
    Column("quality_reasons", Text),
    Column("created_at", Double, nullable=False),
    Column("tags", Text),
    # The long texts last: SQLite walks a chain of pages to whatever stands behind them.
    Column("prompt", Text, nullable=False),
    Column("chosen", AnyText, nullable=False),
    Column("rejected", AnyText, nullable=False),
    Column("tools", Text),
    Column("chosen_calls", Text),
    Column("rejected_calls", Text),
    Column("chosen_ids", Text),
    Column("rejected_ids", Text),
    sqlite_autoincrement=True,
)

# Each index but the first holds exactly the rows of one kind of query, in its order, so that no query's cost grows with
# the table. Databases use a partial index only where the query repeats its condition with literals: hence text. They
# would prefer an index whose first columns the query compares with constants, however badly it fits; so no index
# begins with `split` or `state`. A test reads SQLite's plans.
UNSCORED = text("NOT scored AND state = 'pending'")
SCORED = text("scored AND state = 'pending'")
HELD_OUT = text("split = 'heldout' AND state = 'pending' AND quality > 0")
TRAINABLE = text("split = 'train' AND state = 'pending' AND scored AND quality > 0")
OF_A_USER = text("scored AND user_id IS NOT NULL")


def _partial(name: str, where: TextClause, *columns: Any) -> Index:
    return Index(name, *columns, sqlite_where=where, postgresql_where=where)


Index("ix_pairs_counts", pairs.c.origin, pairs.c.split, pairs.c.state, pairs.c.times_trained)
Index("ix_pairs_key", pairs.c.pair_key, pairs.c.seq)
_partial("ix_pairs_heldout", HELD_OUT, pairs.c.seq)
_partial("ix_pairs_unscored", UNSCORED, pairs.c.seq, pairs.c.split)
_partial("ix_pairs_scored", SCORED, pairs.c.seq, pairs.c.split, pairs.c.scored_version)
_partial("ix_pairs_level", TRAINABLE, pairs.c.times_trained, pairs.c.seq)
_partial("ix_pairs_loss", TRAINABLE, pairs.c.times_trained, pairs.c.last_loss)
_partial("ix_pairs_user", OF_A_USER, pairs.c.user_id, pairs.c.seq)

pair_bands = Table(
    "pair_bands",
    metadata,
    Column("band_key", String(64), primary_key=True),
    Column("pair_seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, index=True),
    sqlite_with_rowid=False,
)
"""Pairs that share a band of their MinHash signatures are candidates for near-duplicates."""

pair_pasts = Table(
    "pair_pasts",
    metadata,
    Column("fingerprint", String(100), primary_key=True),
    Column("pair_seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, index=True),
    Column("times_trained", Integer, nullable=False),
    Column("scored", Boolean, nullable=False),
    Column("scored_version", String(255)),
    Column("scored_at", Double),
    Column("last_loss", Double),
    Column("last_margin", Double),
    Column("state", String(10), nullable=False),
    Column("park_reason", Text),
    sqlite_with_rowid=False,
)
"""Those columns of `pairs` as they were with another base model; see `alignment.store.models`."""

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
    Column("text", AnyText, nullable=False),
    Column("text_key", String(64), nullable=False),
    Column("tools", Text),
    Column("tool_calls", Text),
    Column("token_ids", Text),
    Column("adapter", String(255)),
    Column("state", String(12), nullable=False),
    Column("pair_id", String(64), index=True),
    Column("received_at", Double, nullable=False),
    Index("ix_ratings_partner", "prompt_key", "user_id", "direction", "state", "seq"),
    Index("ix_ratings_received", "received_at"),
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
    Column("text", AnyText, nullable=False),
    Column("tools", Text),
    Column("tool_calls", Text),
    Column("token_ids", Text),
    Column("finish_reason", String(40)),
    Column("client_id", Text),
    Column("adapter", String(255)),
    Column("model", String(255)),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("response_id", "choice_index"),
    sqlite_autoincrement=True,
)

unusable_responses = Table(
    "unusable_responses",
    metadata,
    _seq(),
    Column("response_id", String(255), nullable=False),
    Column("choice_index", Integer, nullable=False),
    Column("reason", AnyText, nullable=False),
    UniqueConstraint("response_id", "choice_index"),
    sqlite_autoincrement=True,
)
"""Answers that cannot be rated, and why, so that feedback about them can be told."""

drift_events = Table(
    "drift_events",
    metadata,
    _seq(),
    Column("at", Double, nullable=False),
    Column("stream", String(300), nullable=False),
    Column("kind", String(40), nullable=False),
    Column("value", Double, nullable=False),
    Column("detail", Text, nullable=False),
    Index("ix_drift_events_stream", "stream", "seq"),
    sqlite_autoincrement=True,
)

loop_state = Table(
    "loop_state",
    metadata,
    Column("key", String(100), primary_key=True),
    Column("value", Text, nullable=False),
    Column("updated_at", Double, nullable=False),
)
