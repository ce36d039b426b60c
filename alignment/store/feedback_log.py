"""Feedback items as they were sent: look up, list, forget.

Functions take the connection of the caller's transaction; `alignment.store.feedback_store` owns transactions.
"""

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.engine import Connection

from alignment.records.json_checks import is_storable
from alignment.store.pair_store import drop_pair
from alignment.store.rating_pairs import drop_rating
from alignment.store.schema import feedback
from core.errors import InvalidFeedbackError


@dataclass(frozen=True, slots=True)
class FeedbackEntry:
    """One stored item as it was sent."""

    id: str
    type: str
    item: dict[str, Any]
    pair_id: str | None
    created_at: float
    received_at: float


@dataclass(frozen=True, slots=True)
class FeedbackPage:
    """A stretch of the list, oldest first. Continue with `after=entries[-1].id`."""

    entries: list[FeedbackEntry]
    has_more: bool


def find_entry(connection: Connection, feedback_id: str) -> FeedbackEntry | None:
    """One stored item."""
    if not is_storable(feedback_id):
        return None
    row = connection.execute(select(feedback).where(feedback.c.id == feedback_id)).one_or_none()
    return None if row is None else _entry(row)


def read_page(connection: Connection, after: str | None, limit: int, type: str | None) -> FeedbackPage:
    """At most `limit` items after the one with id `after`, oldest first.

    Raises:
        InvalidFeedbackError: no item has the id `after`.
    """
    query = select(feedback).order_by(feedback.c.seq).limit(limit + 1)
    if after is not None:
        query_position = select(feedback.c.seq).where(feedback.c.id == after)
        position = connection.execute(query_position).scalar() if is_storable(after) else None
        if position is None:
            raise InvalidFeedbackError(f"no feedback item {after[:100]!r}", "after")
        query = query.where(feedback.c.seq > position)
    if type is not None:
        query = query.where(feedback.c.type == type)
    rows = connection.execute(query).all()
    return FeedbackPage([_entry(row) for row in rows[:limit]], len(rows) > limit)


def delete_entry(connection: Connection, feedback_id: str) -> bool:
    """Forget an item and its pair. False if there is none."""
    row = find_entry(connection, feedback_id)
    if row is None:
        return False
    connection.execute(delete(feedback).where(feedback.c.id == feedback_id))
    drop_rating(connection, feedback_id, row.pair_id)
    if row.pair_id is not None:
        drop_pair(connection, row.pair_id)
        unlinked = update(feedback).where(feedback.c.pair_id == row.pair_id)
        connection.execute(unlinked.values(pair_id=None))
    return True


def count_entries(connection: Connection) -> dict[str, int]:
    """Items by type."""
    query = select(feedback.c.type, func.count()).group_by(feedback.c.type)
    return {row[0]: int(row[1]) for row in connection.execute(query)}


def _entry(row: Any) -> FeedbackEntry:
    return FeedbackEntry(row.id, row.type, json.loads(row.raw), row.pair_id, row.created_at, row.received_at)
