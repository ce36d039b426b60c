"""The tables as the release with schema 1 created them, so that tests can open databases that it left behind."""

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
    UniqueConstraint,
)

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
