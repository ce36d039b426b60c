"""What the alignment loop remembers over a restart: the history of drift, and small states by name.

Functions take the connection of the caller's transaction; `alignment.store.feedback_store` owns transactions.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.engine import Connection

from alignment.drift.events import DriftEvent
from alignment.records.json_checks import canonical_json
from alignment.store.schema import drift_events, loop_state

MAX_EVENTS = 100_000
"""Events kept, about; the oldest are dropped first."""


def put_drift_events(connection: Connection, events: Sequence[DriftEvent]) -> None:
    """Append events (but for those whose value is no number), and drop those that are too old to keep."""
    rows = [
        {
            "at": event.at,
            "stream": event.stream,
            "kind": event.kind,
            "value": event.value,
            "detail": event.detail,
        }
        for event in events
        if math.isfinite(event.value)
    ]
    if rows:
        connection.execute(insert(drift_events), rows)
        newest = connection.execute(select(func.max(drift_events.c.seq))).scalar_one()
        connection.execute(delete(drift_events).where(drift_events.c.seq <= newest - MAX_EVENTS))


def read_drift_events(connection: Connection, limit: int, stream: str | None) -> list[DriftEvent]:
    """The newest events, newest first."""
    columns = (drift_events.c[name] for name in ("at", "stream", "kind", "value", "detail"))
    query = select(*columns).order_by(drift_events.c.seq.desc()).limit(limit)
    if stream is not None:
        query = query.where(drift_events.c.stream == stream)
    return [DriftEvent(*row) for row in connection.execute(query)]


def load_state(connection: Connection, key: str) -> Any | None:
    """The JSON value saved last under this key; None if there is none."""
    value = connection.execute(select(loop_state.c.value).where(loop_state.c.key == key)).scalar_one_or_none()
    return None if value is None else json.loads(value)


def save_state(connection: Connection, key: str, value: object, now: float) -> None:
    """Keep a JSON value under this key, in place of the one before."""
    text = canonical_json(value)
    changed = update(loop_state).where(loop_state.c.key == key).values(value=text, updated_at=now)
    if connection.execute(changed).rowcount == 0:
        connection.execute(insert(loop_state), {"key": key, "value": text, "updated_at": now})
