"""Bringing an older feedback database to this release's schema, in place and in one transaction.

Each step is written in plain SQL for the schema it starts from and never changed again. New tables are made by
`create_all` after the steps. If anything fails, the transaction is rolled back and the database is as it was.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import inspect, text
from sqlalchemy.engine import Connection

from alignment.records.pairs import pair_key
from alignment.store.schema import SCHEMA_VERSION, meta, metadata
from core.errors import ConfigError

logger = logging.getLogger(__name__)

_CHUNK = 1000
_LOCK = 0x6D616365  # "mace": any number that no other user of the PostgreSQL server takes for its own locks


def prepare_tables(connection: Connection) -> None:
    """Create what is missing and bring what is old to `SCHEMA_VERSION`.

    Raises:
        ConfigError: a newer MACE wrote the database, or what it says about itself makes no sense.
    """
    if connection.dialect.name == "postgresql":  # two processes may start at once; SQLite has one writer anyway
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
    found = _found_version(connection)
    if found is not None:
        for version in range(found, SCHEMA_VERSION):
            logger.info("bringing the feedback database from schema %d to %d", version, version + 1)
            STEPS[version](connection)
    metadata.create_all(connection)
    if found is None:
        connection.execute(meta.insert(), {"key": "schema_version", "value": str(SCHEMA_VERSION)})
    elif found != SCHEMA_VERSION:
        changed = meta.update().where(meta.c.key == "schema_version")
        connection.execute(changed.values(value=str(SCHEMA_VERSION)))


def _found_version(connection: Connection) -> int | None:
    """The schema in the database; None if it is new."""
    if not inspect(connection).has_table("meta"):
        return None
    found = connection.execute(text("SELECT value FROM meta WHERE key = 'schema_version'")).scalar()
    if found is None:
        return None
    if not found.isdecimal() or not 1 <= int(found) <= SCHEMA_VERSION:
        message = f"the feedback database has schema {found}, this MACE reads schemas 1 to {SCHEMA_VERSION}"
        raise ConfigError(f"{message}; use the release that wrote it, or a newer one")
    return int(found)


def _from_1_to_2(connection: Connection) -> None:
    """Tags, keys of equal pairs, cached reference scores, quality, and an index for each query of the sampler."""
    double = "DOUBLE PRECISION" if connection.dialect.name == "postgresql" else "DOUBLE"
    for column in (
        "pair_key VARCHAR(64) NOT NULL DEFAULT ''",
        f"quality {double} NOT NULL DEFAULT 1",
        "quality_reasons TEXT",
        "reference_key VARCHAR(64)",
        f"reference_chosen_logp {double}",
        f"reference_rejected_logp {double}",
        f"scored_at {double}",
        "tags TEXT",
    ):
        connection.execute(text(f"ALTER TABLE pairs ADD COLUMN {column}"))
    for index in ("next", "recent", "unscored"):
        connection.execute(text(f"DROP INDEX ix_pairs_{index}"))
    _fill_pairs_2(connection)
    trainable = "split = 'train' AND state = 'pending' AND scored AND quality > 0"
    for index in (
        "counts ON pairs (origin, split, state, times_trained)",
        "key ON pairs (pair_key, seq)",
        "heldout ON pairs (seq) WHERE split = 'heldout' AND state = 'pending' AND quality > 0",
        "unscored ON pairs (seq, split) WHERE NOT scored AND state = 'pending'",
        "scored ON pairs (seq, split, scored_version) WHERE scored AND state = 'pending'",
        f"level ON pairs (times_trained, seq) WHERE {trainable}",
        f"loss ON pairs (times_trained, last_loss) WHERE {trainable}",
        "user ON pairs (user_id, seq) WHERE scored AND user_id IS NOT NULL",
    ):
        connection.execute(text(f"CREATE INDEX ix_pairs_{index}"))
    connection.execute(text("CREATE INDEX ix_ratings_received ON ratings (received_at)"))


def _fill_pairs_2(connection: Connection) -> None:
    """Key of each pair, and the tags of the item that it was made of."""
    some = text(
        "SELECT pairs.seq, pairs.pair_id, prompt, chosen, rejected, "
        "(SELECT raw FROM feedback WHERE feedback.pair_id = pairs.pair_id ORDER BY feedback.seq DESC LIMIT 1) AS raw "
        "FROM pairs WHERE pairs.seq > :after ORDER BY pairs.seq LIMIT :limit"
    )
    change = text("UPDATE pairs SET pair_key = :key, tags = :tags WHERE seq = :seq")
    after = 0
    while rows := connection.execute(some, {"after": after, "limit": _CHUNK}).all():
        connection.execute(change, [_values_2(row) for row in rows])
        after = rows[-1].seq


def _values_2(row: Any) -> dict[str, Any]:
    tags = json.loads(row.raw).get("tags") if row.raw else None
    return {
        "seq": row.seq,
        "key": pair_key(json.loads(row.prompt), row.chosen, row.rejected),
        "tags": json.dumps(tags, sort_keys=True, ensure_ascii=False, separators=(",", ":")) if tags else None,
    }


def _from_2_to_3(connection: Connection) -> None:
    """Tools, token ids, finish reasons, clients' ids; an escape character in texts; no time outside of 1970 to 2100."""
    for table, columns in (
        (
            "pairs",
            ("tools TEXT", "chosen_calls TEXT", "rejected_calls TEXT", "chosen_ids TEXT", "rejected_ids TEXT"),
        ),
        ("ratings", ("tools TEXT", "tool_calls TEXT", "token_ids TEXT")),
        (
            "responses",
            ("tools TEXT", "tool_calls TEXT", "token_ids TEXT", "finish_reason VARCHAR(40)", "client_id TEXT"),
        ),
    ):
        for column in columns:
            connection.execute(text(f"ALTER TABLE {table} ADD COLUMN {column}"))
    escaped = {"escape": "\x1a", "doubled": "\x1a1", "some": "%\x1a%"}
    for table, column in (("pairs", "chosen"), ("pairs", "rejected"), ("ratings", "text"), ("responses", "text")):
        doubled = f"UPDATE {table} SET {column} = replace({column}, :escape, :doubled) WHERE {column} LIKE :some"
        connection.execute(text(doubled), escaped)
    untrue = "created_at < 0 OR created_at >= 4102444800"
    connection.execute(text(f"UPDATE feedback SET created_at = received_at WHERE {untrue}"))


STEPS: dict[int, Callable[[Connection], None]] = {1: _from_1_to_2, 2: _from_2_to_3}
