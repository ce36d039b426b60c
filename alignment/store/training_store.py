"""The store as the alignment loop sees it: what to score and train on next, and what came of it.

Every method costs about the same with a hundred pairs and with a million (docs/store.md).
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy.engine import Connection, Engine

from alignment.drift.events import DriftEvent
from alignment.records.pairs import Split
from alignment.store import loop_store, pair_matches, pair_rows, pair_sampling, pair_store
from alignment.store.database import Database
from alignment.store.pair_matches import PairMatch, UserScore
from alignment.store.pair_rows import StoredPair
from alignment.store.pair_sampling import NewOrder
from alignment.store.pair_store import Backlog, QualityChange
from core.types import PairScore

_NO_KEYS: Mapping[str, str] = MappingProxyType({})
_BANDS_BEFORE_TRIM = 10_000


class TrainingStore(Database):
    """Pairs with their training state; the part of `feedback_store.FeedbackStore` that the alignment loop uses."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        super().__init__(engine)
        self._clock = clock
        self._bands_since_trim = _BANDS_BEFORE_TRIM

    def new_pairs(
        self, limit: int, exclude: Collection[str] = (), order: NewOrder = "newest", since_seq: int = 0
    ) -> list[StoredPair]:
        """Scored pairs that were never trained on: newest first (those behind `since_seq`), or highest loss first."""
        return self._read(lambda c: pair_sampling.new_pairs(c, limit, exclude, order, since_seq))

    def hard_pairs(
        self, limit: int, max_epochs: int, exclude: Collection[str] = (), min_loss: float = 0.0, since_seq: int = 0
    ) -> list[StoredPair]:
        """Pairs trained before, less than `max_epochs` times, whose loss is `min_loss` or more; highest first.

        Only those with `seq` above `since_seq`; of many, the search ends after the worst and the newest few hundred.
        """
        return self._read(lambda c: pair_sampling.hard_pairs(c, limit, max_epochs, exclude, min_loss, since_seq))

    def replay_pairs(
        self, limit: int, max_epochs: int, exclude: Collection[str] = (), seed: int = 0, since_seq: int = 0
    ) -> list[StoredPair]:
        """A random sample of pairs with `seq` above `since_seq`, trained before, less than `max_epochs` times.

        The same for the same seed, as long as the pairs are the same.
        """
        return self._read(lambda c: pair_sampling.replay_pairs(c, limit, max_epochs, exclude, seed, since_seq))

    def held_out_pairs(self, limit: int) -> list[StoredPair]:
        """The newest held-out pairs, newest first, one for each prompt."""
        return self._read(lambda c: pair_sampling.held_out_pairs(c, limit))

    def held_out(
        self, num_recent: int, num_old: int, since_seq: int = 0, seed: int = 0
    ) -> tuple[list[StoredPair], list[StoredPair]]:
        """The gate's test sets: the newest held-out pairs, and a sample of older ones with `seq` above `since_seq`."""
        return self._read(lambda c: pair_sampling.held_out(c, num_recent, num_old, since_seq, seed))

    def unscored_pairs(self, limit: int, exclude: Collection[str] = ()) -> list[StoredPair]:
        """Pairs of both splits that were never scored, newest first."""
        return self._read(lambda c: pair_sampling.unscored_pairs(c, limit, exclude))

    def newest_scored(self, limit: int, split: Split | None = None) -> list[StoredPair]:
        """The newest scored pairs, newest first; distrusted ones (quality 0) too."""
        return self._read(lambda c: pair_sampling.newest_scored(c, limit, split))

    def stale_pairs(
        self, limit: int, version: str | None, exclude: Collection[str] = (), newest: int = 256
    ) -> list[StoredPair]:
        """Of the `newest` newest scored pairs those that another version than `version` (None: base) scored."""
        return self._read(lambda c: pair_sampling.stale_pairs(c, limit, version, exclude, newest))

    def find_pairs(self, pair_ids: Collection[str]) -> list[StoredPair]:
        """The pairs of those ids that exist, oldest first."""
        return self._read(lambda c: pair_rows.find_pairs(c, pair_ids))

    def record_scores(
        self,
        scores: Sequence[PairScore],
        version: str | None = None,
        reference_keys: Mapping[str, str] = _NO_KEYS,
    ) -> None:
        """Keep the latest loss and margin of each pair; `version` names the adapter that gave them (None: base).

        Reference log-probabilities are kept for the pairs in `reference_keys` (by pair id: `CachedReference.key`).
        """
        self._write(lambda c: pair_store.record_scores(c, scores, version, reference_keys, self._clock()))

    def mark_trained(
        self, pair_ids: Collection[str], scores: Sequence[PairScore] = (), version: str | None = None
    ) -> None:
        """One optimizer step used these pairs.

        `scores` take the place of the live adapter's, so leave out those of the shadow adapter.
        """

        def write(connection: Connection) -> None:
            pair_store.mark_trained(connection, pair_ids)
            pair_store.record_scores(connection, scores, version, {}, self._clock())

        self._write(write)

    def mark_failed(self, pair_ids: Collection[str], reason: str, max_attempts: int) -> list[str]:
        """A task with these pairs failed; returns the ids that are parked now, after `max_attempts` in a row."""
        return self._write(lambda c: pair_store.mark_failed(c, pair_ids, reason, max_attempts))

    def park(self, pair_id: str, reason: str) -> bool:
        """Never use this pair again. False if it is unknown or parked already."""
        return self._write(lambda c: pair_store.park_pairs(c, [pair_id], reason)) == 1

    def unpark(self, pair_id: str) -> bool:
        """Use a parked pair again. False if it is not parked."""
        return self._write(lambda c: pair_store.unpark_pairs(c, [pair_id])) == 1

    def backlog(self) -> Backlog:
        """Pairs that wait for their first training, counted up to `pair_store.MAX_BACKLOG`."""
        return self._read(pair_store.count_backlog)

    def set_quality(self, changes: Sequence[QualityChange]) -> None:
        """Set (pair id, quality, reasons): what is left of each pair's weight, 0 to 1, and why."""
        self._write(lambda c: pair_store.set_quality(c, changes))

    def matches(self, pair_keys: Collection[str], limit: int = 100) -> dict[str, list[PairMatch]]:
        """By `pair_key`: pairs that say the same and pairs that say the contrary, up to `limit` each, newest first."""
        return self._read(lambda c: pair_matches.matches(c, pair_keys, limit))

    def put_bands(self, rows: Sequence[tuple[str, int]]) -> None:
        """Remember (band key, `StoredPair.seq`); bands are kept for the newest hundred thousand pairs."""

        def write(connection: Connection) -> None:
            pair_matches.put_bands(connection, rows)
            self._bands_since_trim += len(rows)
            if self._bands_since_trim > _BANDS_BEFORE_TRIM:
                self._bands_since_trim = 0
                pair_matches.trim_bands(connection)

        self._write(write)

    def band_matches(self, band_keys: Collection[str], limit: int = 20) -> list[tuple[str, str]]:
        """(Band key, pair id) of pairs in those bands, up to `limit` for each band, newest first."""
        return self._read(lambda c: pair_matches.band_matches(c, band_keys, limit))

    def user_share(self, newest: int) -> dict[str, int]:
        """How many of the `newest` newest pairs each user sent; "" are those that named no user."""
        return self._read(lambda c: pair_matches.user_share(c, newest))

    def user_scores(self, user: str, limit: int) -> list[UserScore]:
        """Scores of a user's newest scored pairs, newest first; parked ones too."""
        return self._read(lambda c: pair_matches.user_scores(c, user, limit))

    def put_drift_events(self, events: Sequence[DriftEvent]) -> None:
        """Append to the history of drift."""
        self._write(lambda c: loop_store.put_drift_events(c, events))

    def drift_events(self, limit: int, stream: str | None = None) -> list[DriftEvent]:
        """The newest events, of one stream or of all, newest first."""
        return self._read(lambda c: loop_store.read_drift_events(c, limit, stream))

    def load_state(self, key: str) -> Any | None:
        """The JSON value saved last under `key`; None if there is none."""
        return self._read(lambda c: loop_store.load_state(c, key))

    def save_state(self, key: str, value: object) -> None:
        """Keep a JSON value under `key`, in place of the one before."""
        self._write(lambda c: loop_store.save_state(c, key, value, self._clock()))
