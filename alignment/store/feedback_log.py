"""Feedback items: take in, look up, list, forget."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import delete, func, select, update
from sqlalchemy.engine import Connection

from alignment.records.feedback import FEEDBACK_TYPES
from alignment.records.json_checks import is_storable
from alignment.store.database import Database, Part, reads, writes
from alignment.store.intake import ItemOutcome, prepare, write_items
from alignment.store.pairs import drop_pair
from alignment.store.ratings import REPLACED, drop_rating
from alignment.store.schema import feedback, ratings
from core.alignment_config import FeedbackConfig
from core.errors import InvalidFeedbackError

T = TypeVar("T")
Add = Callable[[Sequence[object]], Sequence[ItemOutcome]]
"""Takes in items, like `FeedbackLog.add` without an idempotency key."""
MAX_ITEMS = 1000
"""Items of one call, and of one page."""
_MAX_KEY_CHARS = 200


@dataclass(frozen=True, slots=True)
class FeedbackEntry:
    """One stored item as it was sent."""

    id: str
    type: str
    item: dict[str, Any]
    pair_id: str | None
    created_at: float
    """Unix seconds, in the client's word; `received_at` is the server's."""
    received_at: float


@dataclass(frozen=True, slots=True)
class FeedbackPage:
    """A stretch of the list, oldest first. Continue with `after=entries[-1].id`."""

    entries: list[FeedbackEntry]
    has_more: bool


class _UndoneError(Exception):
    """Rolls a rehearsal back."""


class FeedbackLog(Part):
    """Feedback items, committed before they are acknowledged.

    An id or an idempotency key is one record, whoever races for it, by a UNIQUE constraint.
    """

    def __init__(self, database: Database, config: FeedbackConfig) -> None:
        super().__init__(database)
        self._config = config

    def add(self, items: Sequence[object], *, idempotency_key: str | None = None) -> list[ItemOutcome]:
        """Take in feedback items (decoded JSON); one outcome per item, committed together before this returns.

        A bad item is an outcome of status "error" and does not stop the others. Item i of a call with an
        idempotency key has the key `"<key>#<i>"`.

        Raises:
            InvalidFeedbackError: more than `MAX_ITEMS` items, or an unusable idempotency key.
            StoreUnavailableError: nothing of this call is stored (or, rarely, all of it, and the acknowledgement
                got lost); repeating it with the same ids is safe.
        """
        if len(items) > MAX_ITEMS:
            raise InvalidFeedbackError(f"{len(items)} items in one call, the limit is {MAX_ITEMS}", "items")
        keys = _item_keys(idempotency_key, len(items))
        prepared = [prepare(item, key, self._config) for item, key in zip(items, keys, strict=True)]
        if all(one.error for one in prepared):
            return [one.outcome() for one in prepared]
        return self.database.write(lambda c: write_items(c, prepared, self._config, self.database.clock()))

    def rehearse(self, work: Callable[[Add], T]) -> T:
        """Let `work` add items as by `add`, in one transaction that is undone; returns what `work` does."""
        result: list[T] = []

        def add(connection: Connection, items: Sequence[object]) -> list[ItemOutcome]:
            batch = [prepare(item, None, self._config) for item in items]
            return write_items(connection, batch, self._config, self.database.clock())

        def run(connection: Connection) -> None:
            result.append(work(partial(add, connection)))
            raise _UndoneError

        with suppress(_UndoneError):
            self.database.write(run)
        return result[-1]

    @reads
    def get(self, connection: Connection, feedback_id: str) -> FeedbackEntry | None:
        """One stored item."""
        return _find(connection, feedback_id)

    @reads
    def page(
        self, connection: Connection, *, after: str | None = None, limit: int = 50, type: str | None = None
    ) -> FeedbackPage:
        """Items in order of arrival, from the one after the id `after`; at most `MAX_ITEMS`, whatever the `limit`.

        Raises:
            InvalidFeedbackError: `after` is not the id of an item, or `type` is not a feedback type.
        """
        limit = min(max(limit, 1), MAX_ITEMS)
        query = select(feedback).order_by(feedback.c.seq).limit(limit + 1)
        if type is not None:
            if type not in FEEDBACK_TYPES:
                raise InvalidFeedbackError(f"type must be one of {', '.join(FEEDBACK_TYPES)}", "type")
            query = query.where(feedback.c.type == type)
        if after is not None:
            query_position = select(feedback.c.seq).where(feedback.c.id == after)
            position = connection.execute(query_position).scalar() if is_storable(after) else None
            if position is None:
                raise InvalidFeedbackError(f"no feedback item {after[:100]!r}", "after")
            query = query.where(feedback.c.seq > position)
        rows = connection.execute(query).all()
        return FeedbackPage([_entry(row) for row in rows[:limit]], len(rows) > limit)

    @writes
    def delete(self, connection: Connection, feedback_id: str) -> bool:
        """Forget an item and the pair it made; the partner of a paired rating is open again. False if unknown."""
        entry = _find(connection, feedback_id)
        if entry is None:
            return False
        connection.execute(delete(feedback).where(feedback.c.id == feedback_id))
        drop_rating(connection, feedback_id, entry.pair_id)
        if entry.pair_id is not None:
            drop_pair(connection, entry.pair_id)
            unlinked = update(feedback).where(feedback.c.pair_id == entry.pair_id)
            connection.execute(unlinked.values(pair_id=None))
        return True

    @reads
    def counts(self, connection: Connection) -> dict[str, int]:
        """Items by type."""
        query = select(feedback.c.type, func.count()).group_by(feedback.c.type)
        return {row[0]: int(row[1]) for row in connection.execute(query)}

    @reads
    def rating_counts(self, connection: Connection, since_s: float) -> dict[str | None, tuple[int, int]]:
        """Thumbs (up, down) received since then (Unix seconds), by the version that gave the rated answer.

        None is the bare base model. A rating that its user replaced does not count.
        """
        counted = (
            select(ratings.c.adapter, ratings.c.direction, func.count())
            .where(ratings.c.received_at >= since_s, ratings.c.state != REPLACED)
            .group_by(ratings.c.adapter, ratings.c.direction)
        )
        counts: dict[str | None, tuple[int, int]] = {}
        for adapter, direction, number in connection.execute(counted):
            up, down = counts.get(adapter, (0, 0))
            counts[adapter] = (up + number, down) if direction > 0 else (up, down + number)
        return counts


def _find(connection: Connection, feedback_id: str) -> FeedbackEntry | None:
    if not is_storable(feedback_id):
        return None
    row = connection.execute(select(feedback).where(feedback.c.id == feedback_id)).one_or_none()
    return None if row is None else _entry(row)


def _entry(row: Any) -> FeedbackEntry:
    return FeedbackEntry(row.id, row.type, json.loads(row.raw), row.pair_id, row.created_at, row.received_at)


def _item_keys(key: str | None, num_items: int) -> list[str | None]:
    if key is None:
        return [None] * num_items
    if not 0 < len(key) <= _MAX_KEY_CHARS or not key.isprintable():
        message = f"Idempotency-Key must have 1 to {_MAX_KEY_CHARS} printable characters"
        raise InvalidFeedbackError(message, "Idempotency-Key")
    return [f"{key}#{index}" for index in range(num_items)]
