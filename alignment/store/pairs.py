"""Stored pairs: how they become rows and back, and what training and the quality checks make of them.

`pair_sampling` chooses among them and `pair_matches` compares them. Functions take the connection of the caller's
transaction; methods of `PairStore` have one of their own.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from sqlalchemy import bindparam, case, delete, func, insert, or_, select, update
from sqlalchemy.engine import Connection, Row

from alignment.records.chat import answer_text
from alignment.records.feedback import FeedbackItem
from alignment.records.json_checks import canonical_json, is_storable
from alignment.records.pairs import PairDraft, Split, pair_key, prompt_key, split_of
from alignment.store.database import Part, chunked, decoded, decoded_ids, encoded, ordered_json, reads, writes
from alignment.store.schema import SCORED, pair_bands, pair_pasts, pairs
from core.errors import ConflictError
from core.types import PairScore
from core.wire import CachedReference, Prompt

PENDING, PARKED, LEFT_OUT = "pending", "parked", "left_out"
_RELEARNT = (SCORED, pairs.c.split == "train", pairs.c.quality > 0)
"""`TRAINABLE` in words that find the index in order of arrival."""
_NO_KEYS: Mapping[str, str] = MappingProxyType({})


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
    state: Literal["pending", "parked", "left_out"]
    """Parked: this model cannot be trained on it. Left out: by a rebuild without its user."""
    times_trained: int
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
    """Factor of its weight by the quality checks, 0 to 1; at 0 it is neither trained on nor tested with."""
    quality_reasons: tuple[str, ...] = ()
    reference: CachedReference | None = None
    pair_key: str = ""
    """See `alignment.records.pairs.pair_key`: equal for pairs that say the same."""
    seq: int = 0
    """Grows in order of arrival."""
    scored_at: float | None = None
    """Unix seconds; None if it was never scored."""
    tools: list[dict[str, Any]] | None = None
    """The tools that the prompt is rendered with."""
    chosen_calls: list[dict[str, Any]] | None = None
    """The tool calls of the answer; its text may then be empty."""
    rejected_calls: list[dict[str, Any]] | None = None
    chosen_ids: tuple[int, ...] | None = None
    """The token ids that the model emitted as this answer, if they are known."""
    rejected_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class QualityChange:
    """A pair's new quality."""

    pair_id: str
    quality: float
    """0 to 1, to be multiplied with the weight that the user gave."""
    reasons: tuple[str, ...]
    """One line for each finding (see `alignment.quality.findings`); none for a quality of 1."""


class PairStore(Part):
    """Pairs by id: their scores, trainings, quality and state."""

    @reads
    def find(self, connection: Connection, pair_ids: Collection[str]) -> list[StoredPair]:
        """The pairs of those ids that exist, oldest first."""
        found: list[Row[Any]] = []
        for chunk in chunked(filter(is_storable, pair_ids)):
            found += connection.execute(select(pairs).where(pairs.c.pair_id.in_(chunk)))
        return [stored_pair(row) for row in sorted(found, key=lambda row: int(row.seq))]

    @reads
    def after(self, connection: Connection, seq: int, limit: int) -> list[StoredPair]:
        """The next pairs behind position `seq`, in order of arrival."""
        query = select(pairs).where(pairs.c.seq > seq).order_by(pairs.c.seq).limit(limit)
        return [stored_pair(row) for row in connection.execute(query)]

    @writes
    def record_scores(
        self,
        connection: Connection,
        scores: Sequence[PairScore],
        version: str | None = None,
        reference_keys: Mapping[str, str] = _NO_KEYS,
    ) -> None:
        """Keep the latest loss and margin of each pair; `version` names the adapter that gave them (None: base).

        The reference's log-probabilities are kept for the pairs in `reference_keys` (by pair id:
        `CachedReference.key`). A loss or margin that is not finite is kept as null.
        """
        _record_scores(connection, scores, version, reference_keys, self.database.clock())

    @writes
    def mark_trained(
        self,
        connection: Connection,
        pair_ids: Collection[str],
        scores: Sequence[PairScore] = (),
        shadow: str | None = None,
    ) -> None:
        """Count one optimizer step for each pair, and keep the `scores` that the step computed.

        Those are the shadow adapter's, which may be refused later. They say how much the pair has left to teach, so
        they take the place of the live adapter's; `shadow` is no version's name, so every version scores them anew.
        """
        for chunk in chunked(pair_ids):
            trained = update(pairs).where(pairs.c.pair_id.in_(chunk))
            connection.execute(trained.values(times_trained=pairs.c.times_trained + 1))
        _record_scores(connection, scores, shadow, {}, self.database.clock())

    @writes
    def park(self, connection: Connection, pair_id: str, reason: str) -> bool:
        """Take a pair out of training and evaluation; it stays stored. False if it is unknown or out already."""
        if not is_storable(pair_id):
            return False
        this = update(pairs).where(pairs.c.pair_id == pair_id, pairs.c.state == PENDING)
        return connection.execute(this.values(state=PARKED, park_reason=reason[:1000])).rowcount == 1

    @writes
    def leave_out(self, connection: Connection, users: Collection[str]) -> tuple[int, int]:
        """Take the pairs of these users out of training and tests, and those of all others that were out back in.

        Returns the number of pairs to train on then, and the newest one's position. What a user says later counts.

        Raises:
            ConflictError: a user has no pair, or nothing would be left; nothing changed.
        """
        of_them = pairs.c.user_id.in_([user for user in users if is_storable(user)])
        known = set(connection.execute(select(pairs.c.user_id).where(of_them).distinct()).scalars())
        for user in users:
            if user not in known:
                raise ConflictError(f"no stored pair is by the user {user[:100]!r}")
        back = update(pairs).where(pairs.c.state == LEFT_OUT, or_(pairs.c.user_id.is_(None), ~of_them))
        connection.execute(back.values(state=PENDING, park_reason=None))
        out = update(pairs).where(of_them)
        connection.execute(out.values(state=LEFT_OUT, park_reason="left out by a rebuild without this user"))
        number, newest = connection.execute(select(func.count(), func.max(pairs.c.seq)).where(*_RELEARNT)).one()
        if not number:
            raise ConflictError("there is nothing to learn from: no pair for training is stored and scored")
        return number, newest

    @reads
    def to_relearn(self, connection: Connection, after: int, until: int, limit: int) -> list[StoredPair]:
        """The next pairs of positions in (after, until] that may be trained on, in order of arrival."""
        query = select(pairs).where(*_RELEARNT, pairs.c.seq > after, pairs.c.seq <= until)
        return [stored_pair(row) for row in connection.execute(query.order_by(pairs.c.seq).limit(limit))]

    @writes
    def mark_relearnt(self, connection: Connection, until: int) -> None:
        """Count every pair up to a position as trained once, by a version that learnt all of them from the base."""
        connection.execute(update(pairs).where(*_RELEARNT, pairs.c.seq <= until).values(times_trained=1))

    @writes
    def set_quality(self, connection: Connection, changes: Sequence[QualityChange]) -> None:
        """Write down what the quality checks left of each pair's weight, and why."""
        rows = [
            {"id": one.pair_id, "value": one.quality, "why": canonical_json(one.reasons) if one.reasons else None}
            for one in changes
        ]
        if rows:
            statement = update(pairs).where(pairs.c.pair_id == bindparam("id"))
            statement = statement.values(quality=bindparam("value"), quality_reasons=bindparam("why"))
            connection.execute(statement, rows)

    @reads
    def counts(self, connection: Connection) -> dict[str, int]:
        """Numbers of pairs: train, heldout, parked, left_out, and those of any that were trained on. Walks an index."""
        trained = func.sum(case((pairs.c.times_trained > 0, 1), else_=0))
        group = (pairs.c.origin, pairs.c.split, pairs.c.state)  # the index's order: grouped without sorting
        counts = {"train": 0, "heldout": 0, PARKED: 0, LEFT_OUT: 0, "trained": 0}
        for _, split, state, number, num_trained in connection.execute(
            select(*group, func.count(), trained).group_by(*group)
        ):
            counts[split if state == PENDING else state] += number
            counts["trained"] += num_trained
        return counts


def put_pairs(
    connection: Connection, items: Sequence[tuple[str, PairDraft, FeedbackItem]], fraction: float, now: float
) -> None:
    """Insert new pairs (pair id, pair, the item it comes from), and assign each its split for ever.

    `fraction` of all prompts is held out. `now` is in Unix seconds.
    """
    if items:
        connection.execute(insert(pairs), [_new_row(*item, fraction, now) for item in items])


def drop_pair(connection: Connection, pair_id: str) -> None:
    """Forget a pair, and what was derived of its text."""
    seq = select(pairs.c.seq).where(pairs.c.pair_id == pair_id).scalar_subquery()
    connection.execute(delete(pair_bands).where(pair_bands.c.pair_seq == seq))
    connection.execute(delete(pair_pasts).where(pair_pasts.c.pair_seq == seq))
    connection.execute(delete(pairs).where(pairs.c.pair_id == pair_id))


def fetch_pairs(connection: Connection, seqs: Sequence[int]) -> list[StoredPair]:
    """The pairs of those positions, in the order of `seqs`."""
    found: dict[int, StoredPair] = {}
    for chunk in chunked(seqs):
        for row in connection.execute(select(pairs).where(pairs.c.seq.in_(chunk))):
            found[row.seq] = stored_pair(row)
    return [found[seq] for seq in seqs if seq in found]


_DECODED = {
    "prompt",
    "tags",
    "quality_reasons",
    "tools",
    "chosen_calls",
    "rejected_calls",
    "chosen_ids",
    "rejected_ids",
}
"""Columns of JSON text."""
_SAME = [one.name for one in dataclasses.fields(StoredPair) if one.name in pairs.c and one.name not in _DECODED]


def stored_pair(row: Row[Any]) -> StoredPair:
    """The pair of a whole row of `pairs`."""
    reference = None
    if row.reference_key is not None:
        reference = CachedReference(row.reference_key, row.reference_chosen_logp, row.reference_rejected_logp)
    return StoredPair(
        **{name: getattr(row, name) for name in _SAME},
        user=row.user_id,
        prompt=json.loads(row.prompt),
        tags=json.loads(row.tags) if row.tags else {},
        tools=decoded(row.tools),
        chosen_calls=decoded(row.chosen_calls),
        rejected_calls=decoded(row.rejected_calls),
        chosen_ids=decoded_ids(row.chosen_ids),
        rejected_ids=decoded_ids(row.rejected_ids),
        quality_reasons=tuple(json.loads(row.quality_reasons)) if row.quality_reasons else (),
        reference=reference,
    )


def _new_row(pair_id: str, draft: PairDraft, item: FeedbackItem, fraction: float, now: float) -> dict[str, Any]:
    key = prompt_key(draft.prompt, draft.tools)
    answers = answer_text(draft.chosen, draft.chosen_calls), answer_text(draft.rejected, draft.rejected_calls)
    return {
        **dataclasses.asdict(draft),
        "pair_id": pair_id,
        "origin": item.type,
        "user_id": item.user,
        "prompt": ordered_json(draft.prompt),
        "prompt_key": key,
        "pair_key": pair_key(draft.prompt, *answers),
        "tools": encoded(draft.tools),
        "chosen_calls": encoded(draft.chosen_calls),
        "rejected_calls": encoded(draft.rejected_calls),
        "chosen_ids": encoded(draft.chosen_ids),
        "rejected_ids": encoded(draft.rejected_ids),
        "weight": item.weight,
        "split": split_of(key, fraction),
        "state": PENDING,
        "created_at": now,
        "tags": encoded(item.tags),
    }


def _record_scores(
    connection: Connection,
    scores: Sequence[PairScore],
    version: str | None,
    reference_keys: Mapping[str, str],
    now: float,
) -> None:
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
