"""Stored pairs and their training state.

Order of training: pairs trained least often first, among those the newest first. A new preference is what drift
looks like, so it reaches the next step instead of waiting behind the backlog; counting before recency means that
no pair is seen a second time while another waits for its first, and that a long-running server still works its
backlog off whenever inflow pauses. Held-out pairs never appear in it.

Functions take the connection of the caller's transaction; `alignment.store` owns transactions.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import bindparam, case, delete, func, insert, select, update
from sqlalchemy.engine import Connection, Row
from sqlalchemy.sql.elements import ColumnElement

from alignment.json_checks import canonical_json, is_storable
from alignment.pairs import PairDraft, Prompt, Split, prompt_key, split_of
from alignment.records import FeedbackItem
from alignment.response_store import chunked
from alignment.schema import pairs
from core.config import FeedbackConfig
from core.types import PairScore

PairState = Literal["pending", "parked"]
PENDING, PARKED = "pending", "parked"


@dataclass(frozen=True, slots=True)
class StoredPair:
    """One preference pair and what training did with it so far."""

    pair_id: str
    origin: str
    """Type of the feedback item that made it."""
    prompt: Prompt
    chosen: str
    rejected: str
    weight: float
    split: Split
    state: PairState
    times_trained: int
    attempts: int
    """Failed attempts since it was last trained."""
    created_at: float
    """Unix seconds at which the server received it."""
    user: str | None = None
    chosen_version: str | None = None
    rejected_version: str | None = None
    last_loss: float | None = None
    last_margin: float | None = None
    scored_version: str | None = None
    """Adapter version behind `last_loss` and `last_margin`."""
    park_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Backlog:
    """Pairs that were never trained on and may be."""

    num_pairs: int
    oldest_created_at: float | None


def put_pairs(
    connection: Connection,
    items: Sequence[tuple[str, PairDraft, FeedbackItem]],
    config: FeedbackConfig,
    now: float,
) -> None:
    """Insert new pairs (pair id, pair, the item it comes from) and assign each its split for ever."""
    if items:
        connection.execute(insert(pairs), [_row(*item, config.holdout_fraction, now) for item in items])


def next_training_pairs(
    connection: Connection, limit: int, max_epochs: int, exclude: Collection[str]
) -> list[StoredPair]:
    """The pairs to train on next, best first; see the module's docstring for the order."""
    query = (
        select(pairs)
        .where(pairs.c.split == "train", pairs.c.state == PENDING, pairs.c.times_trained < max_epochs)
        .order_by(pairs.c.times_trained, pairs.c.seq.desc())
        .limit(limit + len(exclude))
    )
    found = [row for row in connection.execute(query) if row.pair_id not in exclude]
    return [_from_row(row) for row in found[:limit]]


def newest_pairs(connection: Connection, split: Split, limit: int) -> list[StoredPair]:
    """The newest pairs of a split, newest first, only the newest of each prompt: what users prefer now.

    A newer preference on a prompt supersedes older ones; users change their minds. Looks at `4 * limit` pairs.
    """
    query = select(pairs).where(pairs.c.split == split, pairs.c.state == PENDING)
    newest: dict[str, Row[Any]] = {}
    for row in connection.execute(query.order_by(pairs.c.seq.desc()).limit(4 * limit)):
        newest.setdefault(row.prompt_key, row)
    return [_from_row(row) for row in list(newest.values())[:limit]]


def unscored_pairs(connection: Connection, limit: int, exclude: Collection[str]) -> list[StoredPair]:
    """Pairs of both splits that no adapter has scored yet, newest first."""
    query = select(pairs).where(pairs.c.scored.is_(False), pairs.c.state == PENDING)
    rows = connection.execute(query.order_by(pairs.c.seq.desc()).limit(limit + len(exclude)))
    return [_from_row(row) for row in rows if row.pair_id not in exclude][:limit]


def find_pairs(connection: Connection, pair_ids: Collection[str]) -> list[StoredPair]:
    """Those of `pair_ids` that exist, oldest first."""
    found: list[Row[Any]] = []
    for chunk in chunked(filter(is_storable, pair_ids)):
        found += connection.execute(select(pairs).where(pairs.c.pair_id.in_(chunk)))
    return [_from_row(row) for row in sorted(found, key=lambda row: int(row.seq))]


def pairs_after(connection: Connection, seq: int, limit: int) -> list[tuple[int, StoredPair]]:
    """The next pairs in order of arrival, each with its position."""
    query = select(pairs).where(pairs.c.seq > seq).order_by(pairs.c.seq).limit(limit)
    return [(row.seq, _from_row(row)) for row in connection.execute(query)]


def record_scores(connection: Connection, scores: Iterable[PairScore], version: str | None) -> None:
    """Keep the newest loss and margin of each pair, and the adapter version that they come from."""
    rows = [
        {"key": score.pair_id, "loss": _finite(score.loss), "margin": _finite(score.margin)} for score in scores
    ]
    if rows:
        values: dict[str, Any] = {"last_loss": bindparam("loss"), "last_margin": bindparam("margin")}
        statement = update(pairs).where(pairs.c.pair_id == bindparam("key"))
        connection.execute(statement.values(scored=True, scored_version=version, **values), rows)


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
    """Forget a pair."""
    connection.execute(delete(pairs).where(pairs.c.pair_id == pair_id))


def count_backlog(connection: Connection) -> Backlog:
    """How many pairs wait for their first training, and since when."""
    waiting: tuple[ColumnElement[bool], ...] = (
        pairs.c.split == "train",
        pairs.c.state == PENDING,
        pairs.c.times_trained == 0,
    )
    number = connection.execute(select(func.count()).select_from(pairs).where(*waiting)).scalar_one()
    oldest = select(pairs.c.created_at).where(*waiting).order_by(pairs.c.seq).limit(1)
    return Backlog(int(number), connection.execute(oldest).scalar_one_or_none())


def count_pairs(connection: Connection) -> dict[str, int]:
    """Numbers of pairs: train, heldout, parked, trained (at least once)."""
    trained = func.sum(case((pairs.c.times_trained > 0, 1), else_=0))
    query = select(pairs.c.split, pairs.c.state, func.count(), trained).group_by(pairs.c.split, pairs.c.state)
    counts = {"train": 0, "heldout": 0, "parked": 0, "trained": 0}
    for split, state, number, num_trained in connection.execute(query):
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


def _row(pair_id: str, draft: PairDraft, item: FeedbackItem, fraction: float, now: float) -> dict[str, Any]:
    key = prompt_key(draft.prompt)
    return {
        "pair_id": pair_id,
        "origin": item.type,
        "user_id": item.user,
        "prompt": canonical_json(draft.prompt),
        "prompt_key": key,
        "chosen": draft.chosen,
        "rejected": draft.rejected,
        "chosen_version": draft.chosen_version,
        "rejected_version": draft.rejected_version,
        "weight": item.weight,
        "split": split_of(key, fraction),
        "state": PENDING,
        "created_at": now,
    }


def _from_row(row: Row[Any]) -> StoredPair:
    return StoredPair(
        pair_id=row.pair_id,
        origin=row.origin,
        prompt=json.loads(row.prompt),
        chosen=row.chosen,
        rejected=row.rejected,
        weight=row.weight,
        split=row.split,
        state=row.state,
        times_trained=row.times_trained,
        attempts=row.attempts,
        created_at=row.created_at,
        user=row.user_id,
        chosen_version=row.chosen_version,
        rejected_version=row.rejected_version,
        last_loss=row.last_loss,
        last_margin=row.last_margin,
        scored_version=row.scored_version,
        park_reason=row.park_reason,
    )
