"""One stored pair, and how it becomes a row of the database and back."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import insert, select
from sqlalchemy.engine import Connection, Row

from alignment.records.feedback import FeedbackItem
from alignment.records.json_checks import canonical_json, is_storable
from alignment.records.pairs import PairDraft, Prompt, Split, contrary_key, pair_key, prompt_key, split_of
from alignment.store.response_store import chunked
from alignment.store.schema import pairs
from core.alignment_config import FeedbackConfig
from core.wire import CachedReference

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
    """Adapter version behind `last_loss` and `last_margin`; None is the bare base model."""
    park_reason: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    quality: float = 1.0
    """What the quality checks left of its weight, 0 to 1; at 0 it is neither trained on nor tested with."""
    quality_reasons: tuple[str, ...] = ()
    reference: CachedReference | None = None
    pair_key: str = ""
    """See `alignment.records.pairs.pair_key`: equal for pairs that say the same."""
    contrary_key: str = ""
    """The `pair_key` of its contradictions."""
    seq: int = 0
    """Grows in order of arrival."""
    scored_at: float | None = None
    """Unix seconds; None if it was never scored."""


def put_pairs(
    connection: Connection,
    items: Sequence[tuple[str, PairDraft, FeedbackItem]],
    config: FeedbackConfig,
    now: float,
) -> None:
    """Insert new pairs (pair id, pair, the item it comes from) and assign each its split for ever."""
    if items:
        connection.execute(insert(pairs), [_new_row(*item, config.holdout_fraction, now) for item in items])


def find_pairs(connection: Connection, pair_ids: Collection[str]) -> list[StoredPair]:
    """Those of `pair_ids` that exist, oldest first."""
    found: list[Row[Any]] = []
    for chunk in chunked(filter(is_storable, pair_ids)):
        found += connection.execute(select(pairs).where(pairs.c.pair_id.in_(chunk)))
    return [stored_pair(row) for row in sorted(found, key=lambda row: int(row.seq))]


def fetch_pairs(connection: Connection, seqs: Sequence[int]) -> list[StoredPair]:
    """The pairs of those positions, in the order of `seqs`."""
    found: dict[int, StoredPair] = {}
    for chunk in chunked(seqs):
        for row in connection.execute(select(pairs).where(pairs.c.seq.in_(chunk))):
            found[row.seq] = stored_pair(row)
    return [found[seq] for seq in seqs if seq in found]


def pairs_after(connection: Connection, seq: int, limit: int) -> list[tuple[int, StoredPair]]:
    """The next pairs in order of arrival, each with its position."""
    query = select(pairs).where(pairs.c.seq > seq).order_by(pairs.c.seq).limit(limit)
    return [(row.seq, stored_pair(row)) for row in connection.execute(query)]


def stored_pair(row: Row[Any]) -> StoredPair:
    """A whole row of `pairs`."""
    reference = None
    if row.reference_key is not None:
        reference = CachedReference(row.reference_key, row.reference_chosen_logp, row.reference_rejected_logp)
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
        tags=json.loads(row.tags) if row.tags else {},
        quality=row.quality,
        quality_reasons=tuple(json.loads(row.quality_reasons)) if row.quality_reasons else (),
        reference=reference,
        pair_key=row.pair_key,
        contrary_key=contrary_key(row.pair_key),
        seq=row.seq,
        scored_at=row.scored_at,
    )


def _new_row(pair_id: str, draft: PairDraft, item: FeedbackItem, fraction: float, now: float) -> dict[str, Any]:
    key = prompt_key(draft.prompt)
    return {
        "pair_id": pair_id,
        "origin": item.type,
        "user_id": item.user,
        "prompt": canonical_json(draft.prompt),
        "prompt_key": key,
        "pair_key": pair_key(draft.prompt, draft.chosen, draft.rejected),
        "chosen": draft.chosen,
        "rejected": draft.rejected,
        "chosen_version": draft.chosen_version,
        "rejected_version": draft.rejected_version,
        "weight": item.weight,
        "split": split_of(key, fraction),
        "state": PENDING,
        "created_at": now,
        "tags": canonical_json(item.tags) if item.tags else None,
    }
