"""Sampling: the pairs that are trained, scored and tested with next.

Every query reads a range of one index (`alignment.store.schema`), at most a few times as many rows as it returns. So
none grows with the table, nor with the pairs that are parked, distrusted or trained to their limit. Pairs trained
equally often are one range; where a query spans several of them, their beginnings are merged here.
"""

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, TypeVar

from sqlalchemy import Select, func, select
from sqlalchemy.engine import Connection, Row

from alignment.records.pairs import prompt_key
from alignment.store.database import Part, reads
from alignment.store.pairs import StoredPair, fetch_pairs, stored_pair
from alignment.store.schema import HELD_OUT, SCORED, TRAINABLE, UNSCORED, pairs

T = TypeVar("T")
NewOrder = Literal["newest", "loss"]
_SAME_PROMPT = 4
"""The newest held-out pairs of different prompts are looked for among this many times as many pairs."""
_HARD_SCAN = 256
_PER_SAMPLE = 2
"""Up to this many rows for each one of a sample, all of them are read instead of searched for."""


class PairSampling(Part):
    """Draws pairs. `exclude` holds pair ids that are left out."""

    @reads
    def new_pairs(
        self,
        connection: Connection,
        limit: int,
        exclude: Collection[str] = (),
        order: NewOrder = "newest",
        since_seq: int = 0,
        min_loss: float = 0.0,
    ) -> list[StoredPair]:
        """Pairs that were scored but never trained, of loss `min_loss` or more (nats).

        The newest behind `since_seq`, or the highest loss of all. Among the newest a loss that is not finite counts as
        high, and with a `min_loss` they are looked for among `_HARD_SCAN` and as many as are wanted.
        """
        query = select(pairs).where(TRAINABLE, pairs.c.times_trained == 0)
        scanned = limit + len(exclude)
        if order == "newest":
            query = query.where(pairs.c.seq > since_seq).order_by(pairs.c.seq.desc())
            scanned += _HARD_SCAN if min_loss else 0
        else:
            query = query.where(pairs.c.last_loss.is_not(None)).order_by(pairs.c.last_loss.desc())
        rows = connection.execute(query.limit(scanned))
        wanted = (row for row in rows if row.last_loss is None or row.last_loss >= min_loss)
        return [stored_pair(row) for row in _first(wanted, limit, exclude)]

    @reads
    def hard_pairs(
        self,
        connection: Connection,
        limit: int,
        max_epochs: int,
        exclude: Collection[str] = (),
        min_loss: float = 0.0,
        since_seq: int = 0,
    ) -> list[StoredPair]:
        """Pairs behind `since_seq`, trained before, less than `max_epochs` times, of loss `min_loss` or more (nats).

        The highest loss comes first. With a `since_seq` they are looked for among the `_HARD_SCAN` of the highest loss
        and as many of the newest: there is no index of both, and behind a change of preferences lie either few pairs or
        most of the hard ones.
        """
        scanned = limit + len(exclude) + (_HARD_SCAN if since_seq else 0)
        rows: dict[int, Row[Any]] = {}
        for times_trained in _levels(connection, max_epochs):
            level = select(pairs.c.seq, pairs.c.pair_id, pairs.c.last_loss)
            level = level.where(TRAINABLE, pairs.c.times_trained == times_trained, pairs.c.last_loss >= min_loss)
            found = connection.execute(level.order_by(pairs.c.last_loss.desc()).limit(scanned)).all()
            if since_seq:
                behind = level.where(pairs.c.seq > since_seq).order_by(pairs.c.seq.desc())
                found = [*found, *connection.execute(behind.limit(scanned))]
            rows |= {row.seq: row for row in found if row.seq > since_seq}
        worst = sorted(rows.values(), key=lambda row: (-row.last_loss, -row.seq))
        return fetch_pairs(connection, [row.seq for row in _first(worst, limit, exclude)])

    @reads
    def replay_pairs(
        self,
        connection: Connection,
        limit: int,
        max_epochs: int,
        exclude: Collection[str] = (),
        seed: int = 0,
        since_seq: int = 0,
    ) -> list[StoredPair]:
        """A random sample of the pairs behind `since_seq` that were trained before, less than `max_epochs` times.

        The same for the same seed, as long as the pairs are the same.
        """
        trained = select(pairs.c.seq, pairs.c.pair_id).where(TRAINABLE)
        levels = [trained.where(pairs.c.times_trained == times) for times in _levels(connection, max_epochs)]
        rows = _scattered(connection, levels, limit + len(exclude), since_seq, None, random.Random(seed))
        allowed = ((row.seq, row.seq) for row in rows if row.pair_id not in exclude)
        return fetch_pairs(connection, _distinct(allowed, limit))

    @reads
    def held_out(
        self, connection: Connection, num_recent: int, num_old: int, since_seq: int = 0, seed: int = 0
    ) -> tuple[list[StoredPair], list[StoredPair]]:
        """The gate's test sets: the newest held-out pairs, and a sample of those before, both behind `since_seq`.

        One pair for each prompt, and no old pair on a prompt of the recent ones: a newer preference on a prompt
        supersedes older ones. Looks at `4 * num_recent` pairs. Old pairs are found behind random positions, so pairs
        after a gap (of deleted or training pairs) are slightly more likely.
        """
        query = select(pairs).where(HELD_OUT, pairs.c.seq > since_seq).order_by(pairs.c.seq.desc())
        newest = connection.execute(query.limit(_SAME_PROMPT * num_recent))
        recent = list(map(stored_pair, _distinct(((row.prompt_key, row) for row in newest), num_recent)))
        last = min(pair.seq for pair in recent) - 1 if recent else None
        taken = {prompt_key(pair.prompt, pair.tools) for pair in recent}
        stored = select(pairs.c.seq, pairs.c.prompt_key).where(HELD_OUT)
        rows = _scattered(connection, [stored], num_old, since_seq, last, random.Random(seed))
        old = _distinct(((row.prompt_key, row.seq) for row in rows if row.prompt_key not in taken), num_old)
        return recent, fetch_pairs(connection, sorted(old, reverse=True))

    @reads
    def unscored_pairs(
        self, connection: Connection, limit: int, exclude: Collection[str] = ()
    ) -> list[StoredPair]:
        """Pairs of both splits that no adapter has scored yet, newest first."""
        query = select(pairs).where(UNSCORED).order_by(pairs.c.seq.desc()).limit(limit + len(exclude))
        return [stored_pair(row) for row in _first(connection.execute(query), limit, exclude)]

    @reads
    def newest_scored(self, connection: Connection, limit: int) -> list[StoredPair]:
        """The newest scored pairs, newest first; distrusted ones (quality 0) too."""
        return fetch_pairs(connection, [row.seq for row in _newest_scored_rows(connection, limit)])

    @reads
    def stale_pairs(
        self,
        connection: Connection,
        limit: int,
        version: str | None,
        exclude: Collection[str] = (),
        newest: int = 256,
    ) -> list[StoredPair]:
        """Those of the `newest` newest scored pairs that another version than `version` (None: base) scored last."""
        stale = (row for row in _newest_scored_rows(connection, newest) if row.scored_version != version)
        return fetch_pairs(connection, [row.seq for row in _first(stale, limit, exclude)])


def _distinct(keyed: Iterable[tuple[object, T]], limit: int) -> list[T]:
    """The first value of each key, up to `limit`; reads no further than it must."""
    found: dict[object, T] = {}
    for key, value in keyed:
        if len(found) == limit:
            break
        found.setdefault(key, value)
    return list(found.values())


def _newest_scored_rows(connection: Connection, limit: int) -> Iterable[Row[Any]]:
    query = select(pairs.c.seq, pairs.c.scored_version, pairs.c.pair_id).where(SCORED)
    return connection.execute(query.order_by(pairs.c.seq.desc()).limit(limit))


def _scattered(
    connection: Connection,
    queries: Sequence[Select[Any]],
    count: int,
    after: int,
    last: int | None,
    chooser: random.Random,
) -> Iterator[Row[Any]]:
    """Rows of the queries in (after, last] in random order, some perhaps twice: about `count`, fewer if there are few.

    All of them if they are few. Else those that follow a random position each, which favours rows behind a gap a
    little, and needs no sort of what may be a million rows.
    """
    if count < 1:
        return
    bounded = [query.where(pairs.c.seq <= last) if last is not None else query for query in queries]
    enough = _PER_SAMPLE * count
    newest = [
        connection.execute(query.where(pairs.c.seq > after).order_by(pairs.c.seq.desc()).limit(enough)).all()
        for query in bounded
    ]
    rows = [row for level in newest for row in level]
    if len(rows) < enough:
        chooser.shuffle(rows)
        yield from rows
        return
    end = max(row.seq for row in rows)
    for _ in range(2 * count):
        start = chooser.randint(after + 1, end)
        nexts = (query.where(pairs.c.seq >= start).order_by(pairs.c.seq).limit(1) for query in bounded)
        found = [row for row in (connection.execute(query).first() for query in nexts) if row is not None]
        yield min(found, key=lambda row: int(row.seq))


def _levels(connection: Connection, max_epochs: int) -> range:
    """The numbers of trainings that pairs worth another one can have."""
    most = connection.execute(select(func.max(pairs.c.times_trained)).where(TRAINABLE)).scalar() or 0
    return range(1, min(most + 1, max_epochs))


def _first(rows: Iterable[Row[Any]], limit: int, exclude: Collection[str]) -> Iterator[Row[Any]]:
    return islice((row for row in rows if row.pair_id not in exclude), limit)
