"""What training and the quality checks make of stored pairs: scores, counts, weights, parking.

Functions take the connection of the caller's transaction; `alignment.store.feedback_store` owns transactions.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, case, delete, func, select, update
from sqlalchemy.engine import Connection

from alignment.records.json_checks import canonical_json, is_storable
from alignment.store.pair_rows import PARKED, PENDING, PairState, StoredPair
from alignment.store.response_store import chunked
from alignment.store.schema import TRAINABLE, UNSCORED, pair_bands, pairs
from core.types import PairScore

__all__ = ["Backlog", "PairState", "QualityChange", "StoredPair"]

QualityChange = tuple[str, float, tuple[str, ...]]
"""Pair id, quality in 0..1, reasons."""
MAX_BACKLOG = 1000
"""The backlog is counted up to here: counting all of it would take longer and longer."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Pairs that were never trained on and may be."""

    num_pairs: int
    """At most about `MAX_BACKLOG`; unscored pairs and scored ones are counted up to it each."""
    oldest_created_at: float | None


def record_scores(
    connection: Connection,
    scores: Iterable[PairScore],
    version: str | None,
    reference_keys: Mapping[str, str],
    now: float,
) -> None:
    """Keep the newest loss and margin of each pair and the adapter version that they come from.

    The reference's log-probabilities are kept for those pairs that `reference_keys` has a key for.
    """
    plain, with_reference = [], []
    for score in scores:
        row = {"id": score.pair_id, "loss": _finite(score.loss), "margin": _finite(score.margin)}
        reference = (score.reference_chosen_logp, score.reference_rejected_logp)
        key = reference_keys.get(score.pair_id)
        if key is not None and all(map(math.isfinite, reference)):
            row |= {"key": key, "chosen_logp": reference[0], "rejected_logp": reference[1]}
            with_reference.append(row)
        else:
            plain.append(row)
    score_values: dict[str, Any] = {"last_loss": bindparam("loss"), "last_margin": bindparam("margin")}
    score_values |= {"scored": True, "scored_version": version, "scored_at": now}
    reference_values: dict[str, Any] = {
        "reference_key": bindparam("key"),
        "reference_chosen_logp": bindparam("chosen_logp"),
        "reference_rejected_logp": bindparam("rejected_logp"),
    }
    statement = update(pairs).where(pairs.c.pair_id == bindparam("id"))
    if plain:
        connection.execute(statement.values(**score_values), plain)
    if with_reference:
        connection.execute(statement.values(**score_values, **reference_values), with_reference)


def set_quality(connection: Connection, changes: Sequence[QualityChange]) -> None:
    """Write down what the quality checks left of each pair's weight, and why."""
    rows = [
        {"id": pair_id, "value": quality, "reasons": canonical_json(list(reasons)) if reasons else None}
        for pair_id, quality, reasons in changes
    ]
    if rows:
        statement = update(pairs).where(pairs.c.pair_id == bindparam("id"))
        connection.execute(
            statement.values(quality=bindparam("value"), quality_reasons=bindparam("reasons")), rows
        )


def mark_trained(connection: Connection, pair_ids: Collection[str]) -> None:
    """Count one more training step for each pair; earlier failures are forgiven."""
    for chunk in chunked(pair_ids):
        trained = update(pairs).where(pairs.c.pair_id.in_(chunk))
        connection.execute(trained.values(times_trained=pairs.c.times_trained + 1, attempts=0))


def mark_failed(connection: Connection, pair_ids: Collection[str], reason: str, max_attempts: int) -> list[str]:
    """Count a failed attempt for each pair and park those that had `max_attempts`. Returns the parked."""
    parked: list[str] = []
    for chunk in chunked(pair_ids):
        these = pairs.c.pair_id.in_(chunk)
        connection.execute(update(pairs).where(these).values(attempts=pairs.c.attempts + 1))
        hopeless = select(pairs.c.pair_id).where(these, pairs.c.state == PENDING, pairs.c.attempts >= max_attempts)
        parked += connection.execute(hopeless).scalars()
    park_pairs(connection, parked, reason)
    return parked


def park_pairs(connection: Connection, pair_ids: Collection[str], reason: str) -> int:
    """Take pairs out of training and evaluation; they stay stored. Returns how many."""
    return _set_state(connection, pair_ids, PARKED, reason[:1000])


def unpark_pairs(connection: Connection, pair_ids: Collection[str]) -> int:
    """Give parked pairs a fresh start. Returns how many."""
    return _set_state(connection, pair_ids, PENDING, None)


def drop_pair(connection: Connection, pair_id: str) -> None:
    """Forget a pair, and what was derived of its text."""
    seq = select(pairs.c.seq).where(pairs.c.pair_id == pair_id).scalar_subquery()
    connection.execute(delete(pair_bands).where(pair_bands.c.pair_seq == seq))
    connection.execute(delete(pairs).where(pairs.c.pair_id == pair_id))


def count_backlog(connection: Connection) -> Backlog:
    """How many pairs wait for their first training (up to `MAX_BACKLOG` scored and as many others), and since when."""
    scored = select(pairs.c.seq, pairs.c.split).where(TRAINABLE, pairs.c.times_trained == 0)
    number, oldest = 0, []
    for waiting in (scored, select(pairs.c.seq, pairs.c.split).where(UNSCORED)):
        some = waiting.order_by(pairs.c.seq).limit(MAX_BACKLOG).subquery()
        count = select(func.count(), func.min(some.c.seq)).where(some.c.split == "train")
        num_pairs, first = connection.execute(count).one()
        number += num_pairs
        if first is not None:
            oldest.append(first)
    created_at = select(pairs.c.created_at).where(pairs.c.seq == min(oldest)) if oldest else None
    return Backlog(number, None if created_at is None else connection.execute(created_at).scalar_one())


def count_pairs(connection: Connection) -> dict[str, int]:
    """Numbers of pairs: train, heldout, parked, trained (at least once)."""
    trained = func.sum(case((pairs.c.times_trained > 0, 1), else_=0))
    group = (pairs.c.origin, pairs.c.split, pairs.c.state)  # the index's order: grouped without sorting
    counts = {"train": 0, "heldout": 0, "parked": 0, "trained": 0}
    for _, split, state, number, num_trained in connection.execute(
        select(*group, func.count(), trained).group_by(*group)
    ):
        counts[PARKED if state == PARKED else split] += number
        counts["trained"] += num_trained
    return counts


def _set_state(connection: Connection, pair_ids: Collection[str], state: str, reason: str | None) -> int:
    changed = 0
    for chunk in chunked(filter(is_storable, pair_ids)):
        these = update(pairs).where(pairs.c.pair_id.in_(chunk), pairs.c.state != state)
        changed += connection.execute(these.values(state=state, park_reason=reason, attempts=0)).rowcount
    return changed


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
