"""Which pairs are trained, scored and tested with next.

Every query reads a range of one index (`alignment.store.schema`), at most a few times as many rows as it returns. So
none grows with the table, nor with the pairs that are parked, distrusted or trained to their limit. Pairs trained
equally often are one range; where a query spans several of them, their beginnings are merged here.

Functions take the connection of the caller's transaction; `alignment.store.feedback_store` owns transactions.
"""

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from sqlalchemy import Select, func, select
from sqlalchemy.engine import Connection, Row

from alignment.records.pairs import Split, prompt_key
from alignment.store.pair_rows import StoredPair, fetch_pairs, stored_pair
from alignment.store.schema import HELD_OUT, SCORED, TRAINABLE, UNSCORED, pairs

NewOrder = Literal["newest", "loss"]
_SAME_PROMPT = 4
"""`held_out_pairs` looks at this many times as many pairs as it may return."""
_SPLIT_SHARE = 20
"""`newest_scored` finds enough of a split that has this part of the newest pairs."""
_HARD_SCAN = 256
_PER_SAMPLE = 2
"""Up to this many rows for each one of a sample, all of them are read instead of searched for."""


def new_pairs(
    connection: Connection, limit: int, exclude: Collection[str], order: NewOrder, since_seq: int
) -> list[StoredPair]:
    """Pairs that were scored but never trained: the newest behind `since_seq`, or those of the highest loss of all."""
    query = select(pairs).where(TRAINABLE, pairs.c.times_trained == 0)
    if order == "newest":
        query = query.where(pairs.c.seq > since_seq).order_by(pairs.c.seq.desc())
    else:
        query = query.where(pairs.c.last_loss.is_not(None)).order_by(pairs.c.last_loss.desc())
    return _first_rows(connection, query, limit, exclude)


def hard_pairs(
    connection: Connection, limit: int, max_epochs: int, exclude: Collection[str], min_loss: float, since_seq: int
) -> list[StoredPair]:
    """Pairs behind `since_seq` trained before, less than `max_epochs` times, that still have this loss; highest first.

    With a `since_seq` they are looked for among the `_HARD_SCAN` of the highest loss and as many of the newest: there
    is no index of both, and behind a change of preferences lie either few pairs or most of the hard ones.
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
    return fetch_pairs(connection, _first_seqs(worst, limit, exclude))


def replay_pairs(
    connection: Connection, limit: int, max_epochs: int, exclude: Collection[str], seed: int, since_seq: int
) -> list[StoredPair]:
    """A sample of the pairs behind `since_seq` trained before, less than `max_epochs` times; the same for a seed."""
    trained = select(pairs.c.seq, pairs.c.pair_id).where(TRAINABLE)
    levels = [trained.where(pairs.c.times_trained == times) for times in _levels(connection, max_epochs)]
    rows = _scattered(connection, levels, limit + len(exclude), since_seq, None, random.Random(seed))
    seqs: dict[int, None] = {}
    for row in rows:
        if len(seqs) == limit:
            break
        if row.pair_id not in exclude:
            seqs[row.seq] = None
    return fetch_pairs(connection, list(seqs))


def held_out_pairs(connection: Connection, limit: int, since_seq: int = 0) -> list[StoredPair]:
    """The newest held-out pairs behind `since_seq`, newest first, one for each prompt: what users prefer now.

    A newer preference on a prompt supersedes older ones; users change their minds. Looks at `4 * limit` pairs.
    """
    query = select(pairs).where(HELD_OUT, pairs.c.seq > since_seq).order_by(pairs.c.seq.desc())
    newest: dict[str, Row[Any]] = {}
    for row in connection.execute(query.limit(_SAME_PROMPT * limit)):
        newest.setdefault(row.prompt_key, row)
    return [stored_pair(row) for row in islice(newest.values(), limit)]


def held_out(
    connection: Connection, num_recent: int, num_old: int, since_seq: int, seed: int
) -> tuple[list[StoredPair], list[StoredPair]]:
    """The gate's test sets: the newest held-out pairs, and a sample of those before, both behind position `since_seq`.

    One pair for each prompt, and no old pair on a prompt of the recent ones: those supersede it. Old pairs are found
    behind random positions, so pairs after a gap (of deleted or training pairs) are slightly more likely.
    """
    recent = held_out_pairs(connection, num_recent, since_seq)
    last = min(pair.seq for pair in recent) - 1 if recent else None
    taken = {prompt_key(pair.prompt) for pair in recent}
    stored = select(pairs.c.seq, pairs.c.prompt_key).where(HELD_OUT)
    old: dict[str, int] = {}
    for row in _scattered(connection, [stored], num_old, since_seq, last, random.Random(seed)):
        if len(old) == num_old:
            break
        if row.prompt_key not in taken:
            old.setdefault(row.prompt_key, row.seq)
    return recent, fetch_pairs(connection, sorted(old.values(), reverse=True))


def unscored_pairs(connection: Connection, limit: int, exclude: Collection[str]) -> list[StoredPair]:
    """Pairs of both splits that no adapter has scored yet, newest first."""
    return _first_rows(connection, select(pairs).where(UNSCORED).order_by(pairs.c.seq.desc()), limit, exclude)


def newest_scored(connection: Connection, limit: int, split: Split | None) -> list[StoredPair]:
    """The newest scored pairs, newest first. For a split, looks at `20 * limit` pairs."""
    rows = _newest_scored_rows(connection, limit * (_SPLIT_SHARE if split else 1))
    seqs = (row.seq for row in rows if split in (None, row.split))
    return fetch_pairs(connection, list(islice(seqs, limit)))


def stale_pairs(
    connection: Connection, limit: int, version: str | None, exclude: Collection[str], newest: int
) -> list[StoredPair]:
    """Those of the `newest` newest scored pairs whose scores come from another version; newest first."""
    stale = (row for row in _newest_scored_rows(connection, newest) if row.scored_version != version)
    return fetch_pairs(connection, _first_seqs(stale, limit, exclude))


def _newest_scored_rows(connection: Connection, limit: int) -> Iterable[Row[Any]]:
    query = select(pairs.c.seq, pairs.c.split, pairs.c.scored_version, pairs.c.pair_id).where(SCORED)
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


def _first_rows(
    connection: Connection, query: Select[Any], limit: int, exclude: Collection[str]
) -> list[StoredPair]:
    rows = connection.execute(query.limit(limit + len(exclude)))
    return [stored_pair(row) for row in islice((row for row in rows if row.pair_id not in exclude), limit)]


def _first_seqs(rows: Iterable[Row[Any]], limit: int, exclude: Collection[str]) -> list[int]:
    return [int(row.seq) for row in islice((row for row in rows if row.pair_id not in exclude), limit)]
