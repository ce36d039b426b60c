"""Thumbs up and down by adapter version, for the verdict on a canary."""

from sqlalchemy import func, select
from sqlalchemy.engine import Connection

from alignment.store.schema import ratings


def rating_counts(connection: Connection, since_s: float) -> dict[str | None, tuple[int, int]]:
    """Thumbs (up, down) received since then (Unix seconds), by the version that gave the rated answer.

    None is the bare base model. A rating that its user replaced does not count.
    """
    counted = (
        select(ratings.c.adapter, ratings.c.direction, func.count())
        .where(ratings.c.received_at >= since_s, ratings.c.state != "replaced")
        .group_by(ratings.c.adapter, ratings.c.direction)
    )
    counts: dict[str | None, tuple[int, int]] = {}
    for adapter, direction, number in connection.execute(counted):
        up, down = counts.get(adapter, (0, 0))
        counts[adapter] = (up + number, down) if direction > 0 else (up, down + number)
    return counts
