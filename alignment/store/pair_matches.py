"""Look-ups of the quality checks: stored pairs that resemble a pair, and what a user sent.

Every answer is bounded, newest first: of a pair that was sent a hundred thousand times, the newest copies are enough.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.engine import Connection

from alignment.records.pairs import contrary_key
from alignment.store.database import Database, Part, insert_new, reads, writes
from alignment.store.schema import OF_A_USER, pair_bands, pairs

MAX_BANDED_PAIRS = 100_000
"""Bands are kept for about so many newest pairs: near-duplicates further apart are not looked for."""
_BANDS_BEFORE_TRIM = 10_000


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
    user: str | None
    margin: float
    """Implicit reward margin (nats): above zero the adapter agrees with the user."""
    version: str | None
    """Adapter version behind the score; None is the bare base model."""


class PairMatches(Part):
    """Looks up pairs that resemble others, and remembers the bands of their texts (`alignment.quality`)."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._bands_since_trim = _BANDS_BEFORE_TRIM

    @reads
    def find(
        self, connection: Connection, pair_keys: Collection[str], limit: int = 100
    ) -> dict[str, list[PairMatch]]:
        """The pairs with each key and the contrary ones, up to `limit` of either, newest first."""
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

    @writes
    def put_bands(self, connection: Connection, rows: Sequence[tuple[str, int]]) -> None:
        """Remember which bands (band key, `StoredPair.seq`) a pair falls into; repeating it is harmless."""
        values = [{"band_key": band_key, "pair_seq": seq} for band_key, seq in set(rows)]
        insert_new(connection, pair_bands, values, pair_bands.c.pair_seq)
        self._bands_since_trim += len(rows)
        if self._bands_since_trim > _BANDS_BEFORE_TRIM:
            self._bands_since_trim = 0
            trim_bands(connection)

    @reads
    def band_matches(
        self, connection: Connection, band_keys: Collection[str], limit: int = 20
    ) -> list[tuple[str, str]]:
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

    @reads
    def user_share(self, connection: Connection, newest: int) -> dict[str, int]:
        """Each user's number among the `newest` newest pairs; "" are those that named no user."""
        users = connection.execute(select(pairs.c.user_id).order_by(pairs.c.seq.desc()).limit(newest)).scalars()
        return dict(Counter(user or "" for user in users))

    @reads
    def user_scores(self, connection: Connection, user: str, limit: int) -> list[UserScore]:
        """Scores of the newest scored pairs of a user, newest first, parked ones too; those not finite are left out."""
        query = (
            select(
                pairs.c.pair_id, pairs.c.user_id, pairs.c.last_margin, pairs.c.scored_version, pairs.c.last_loss
            )
            .where(OF_A_USER, pairs.c.user_id == user)
            .order_by(pairs.c.seq.desc())
            .limit(limit)
        )
        rows = [row for row in connection.execute(query) if row.last_loss is not None]
        return [UserScore(*row[:4]) for row in rows if row.last_margin is not None]


def trim_bands(connection: Connection) -> None:
    """Forget the bands of all but the newest pairs."""
    newest = connection.execute(select(func.max(pair_bands.c.pair_seq))).scalar()
    if newest is not None:
        connection.execute(delete(pair_bands).where(pair_bands.c.pair_seq <= newest - MAX_BANDED_PAIRS))
