"""Which stored pairs resemble a pair, and what a user sent: what the quality checks look up.

Every answer is bounded, newest first: of a pair that was sent a hundred thousand times, the newest copies are enough.
Functions take the connection of the caller's transaction; `alignment.store.feedback_store` owns transactions.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.engine import Connection

from alignment.records.pairs import contrary_key
from alignment.store.database import insert_new
from alignment.store.schema import OF_A_USER, pair_bands, pairs

MAX_BANDED_PAIRS = 100_000
"""Bands are kept for about so many newest pairs: near-duplicates further apart are not looked for."""


@dataclass(frozen=True, slots=True)
class PairMatch:
    """A stored pair that says the same as a key, or the contrary."""

    pair_id: str
    user: str | None
    is_contrary: bool
    seq: int


@dataclass(frozen=True, slots=True)
class UserScore:
    """The newest score of one of a user's pairs."""

    pair_id: str
    seq: int
    loss: float
    margin: float
    version: str | None
    """Adapter version behind the score; None is the bare base model."""


def matches(connection: Connection, pair_keys: Collection[str], limit: int) -> dict[str, list[PairMatch]]:
    """By key: the pairs with that key and the contrary ones, up to `limit` of either, newest first."""
    found: dict[str, list[PairMatch]] = {}
    for key in set(pair_keys):
        both = [
            PairMatch(row.pair_id, row.user_id, is_contrary, row.seq)
            for is_contrary, one in ((False, key), (True, contrary_key(key)))
            for row in connection.execute(
                select(pairs.c.pair_id, pairs.c.user_id, pairs.c.seq)
                .where(pairs.c.pair_key == one)
                .order_by(pairs.c.seq.desc())
                .limit(limit)
            )
        ]
        found[key] = sorted(both, key=lambda match: -match.seq)
    return found


def put_bands(connection: Connection, rows: Sequence[tuple[str, int]]) -> None:
    """Remember which bands (band key, pair's `seq`) a pair falls into; repeating it is harmless."""
    values = [{"band_key": band_key, "pair_seq": seq} for band_key, seq in set(rows)]
    insert_new(connection, pair_bands, values, pair_bands.c.pair_seq)


def trim_bands(connection: Connection) -> None:
    """Forget the bands of all but the newest pairs."""
    newest = connection.execute(select(func.max(pair_bands.c.pair_seq))).scalar()
    if newest is not None:
        connection.execute(delete(pair_bands).where(pair_bands.c.pair_seq <= newest - MAX_BANDED_PAIRS))


def band_matches(connection: Connection, band_keys: Collection[str], limit: int) -> list[tuple[str, str]]:
    """(Band key, pair id) of the pairs in those bands, up to `limit` for each band, newest first."""
    found = []
    for key in dict.fromkeys(band_keys):
        query = (
            select(pairs.c.pair_id)
            .join(pair_bands, pair_bands.c.pair_seq == pairs.c.seq)
            .where(pair_bands.c.band_key == key)
            .order_by(pair_bands.c.pair_seq.desc())
            .limit(limit)
        )
        found += [(key, pair_id) for pair_id in connection.execute(query).scalars()]
    return found


def user_share(connection: Connection, newest: int) -> dict[str, int]:
    """How many of the `newest` newest pairs each user sent; "" are those that named no user."""
    users = connection.execute(select(pairs.c.user_id).order_by(pairs.c.seq.desc()).limit(newest)).scalars()
    return dict(Counter(user or "" for user in users))


def user_scores(connection: Connection, user: str, limit: int) -> list[UserScore]:
    """Scores of the newest scored pairs of a user, newest first; those that were not finite are left out."""
    query = (
        select(pairs.c.pair_id, pairs.c.seq, pairs.c.last_loss, pairs.c.last_margin, pairs.c.scored_version)
        .where(OF_A_USER, pairs.c.user_id == user)
        .order_by(pairs.c.seq.desc())
        .limit(limit)
    )
    rows = connection.execute(query)
    return [UserScore(*row) for row in rows if row.last_loss is not None and row.last_margin is not None]
