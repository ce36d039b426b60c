"""Taking in feedback: everything that happens between a raw item and its rows.

`prepare` needs no database and runs in the caller's thread; `write_items` runs inside one transaction. Its order
matters: known ids are looked up *before* response ids are resolved, so that a retry is answered as a duplicate
even if the responses it names were dropped since.
"""

import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import or_, select, update
from sqlalchemy.engine import Connection

from alignment.records.feedback import (
    Comment,
    Correction,
    FeedbackItem,
    OpenAIPreferenceRow,
    PreferenceByIds,
    PreferenceRow,
    Rating,
    ResponseRef,
    parse_item,
)
from alignment.records.json_checks import canonical_json
from alignment.records.pairs import (
    PairDraft,
    StoredResponse,
    checked_text,
    found_response,
    pair_from_correction,
    pair_from_ids,
    pair_from_row,
)
from alignment.store.database import chunked, insert_new
from alignment.store.pairs import put_pairs
from alignment.store.ratings import put_rating
from alignment.store.responses import find_responses
from alignment.store.schema import feedback
from core.alignment_config import FeedbackConfig
from core.errors import FeedbackError, InvalidFeedbackError, StoreUnavailableError

Responses = dict[ResponseRef, StoredResponse]


@dataclass(frozen=True, slots=True)
class ItemOutcome:
    """The answer for one item. `accepted` and `duplicate` mean: committed."""

    id: str | None
    """The record's id; None for a refused item that brought none."""
    status: Literal["accepted", "duplicate", "error"]
    pair_id: str | None = None
    """The pair that the item made, if it made one (yet)."""
    error_type: str | None = None
    """Name of the class in core.errors."""
    message: str | None = None
    param: str | None = None


@dataclass(slots=True)
class _Record:
    """The identity that an id or an idempotency key stands for."""

    id: str
    fingerprint: str
    pair_id: str | None = None


@dataclass(slots=True)
class Prepared:
    """One item on its way in."""

    raw_json: str = ""
    fingerprint: str = ""
    idempotency_key: str | None = None
    item: FeedbackItem | None = None
    draft: PairDraft | None = None
    response: StoredResponse | None = None
    """The response that a rating, correction or comment is about."""
    record: _Record | None = None
    status: Literal["accepted", "duplicate"] = "accepted"
    error: FeedbackError | None = None

    @property
    def client_id(self) -> str | None:
        """The id that the client chose, if any."""
        return self.item.id if self.item else None

    def outcome(self) -> ItemOutcome:
        """The answer for this item, once the transaction is committed."""
        if (error := self.error) is not None:
            return ItemOutcome(self.client_id, "error", None, type(error).__name__, str(error), error.param)
        assert self.record is not None
        return ItemOutcome(self.record.id, self.status, self.record.pair_id)


def prepare(raw: object, idempotency_key: str | None, config: FeedbackConfig) -> Prepared:
    """Parse and normalise as far as that goes without the database. Never raises a FeedbackError, but keeps it."""
    prepared = Prepared(idempotency_key=idempotency_key)
    try:
        prepared.item = item = parse_item(raw)
        if isinstance(item, PreferenceRow | OpenAIPreferenceRow):
            prepared.draft = pair_from_row(item, config.max_text_chars)
        elif isinstance(item, Comment):
            checked_text(item.value, "value", config.max_text_chars)
        _ = item.refs  # an id that contradicts itself is refused here
        prepared.raw_json, prepared.fingerprint = canonical_json(raw), _fingerprint(raw)
    except FeedbackError as error:
        prepared.error = error
    return prepared


def write_items(
    connection: Connection, batch: Sequence[Prepared], config: FeedbackConfig, now: float
) -> list[ItemOutcome]:
    """Store the batch inside the caller's transaction; one outcome per item, in order.

    Each item's outcome is as if the items had come one by one.
    """
    batch = [replace(prepared) for prepared in batch]  # a rolled-back attempt must leave no trace in them
    known = _Known(connection, batch)
    valid = [prepared.item for prepared in batch if prepared.item and not prepared.error]
    responses = find_responses(connection, {ref for item in valid for ref in item.refs}, now)
    fresh = [prepared for prepared in batch if not prepared.error and _admit(prepared, known, responses, config)]
    fresh = _insert_feedback(connection, fresh, now)
    pairs = [
        (prepared.record.pair_id, prepared.draft, prepared.item)
        for prepared in fresh
        if prepared.draft and prepared.item and prepared.record and prepared.record.pair_id
    ]
    put_pairs(connection, pairs, config.holdout_fraction, now)
    for prepared in fresh:
        if isinstance(prepared.item, Rating):
            _settle_rating(connection, prepared, config, now)
    return [prepared.outcome() for prepared in batch]


class _Known:
    """Ids and idempotency keys that are taken, by the database or by an earlier item of the batch."""

    def __init__(self, connection: Connection, batch: Sequence[Prepared]) -> None:
        self._by_id: dict[str, _Record] = {}
        self._by_key: dict[str, _Record] = {}
        named = [prepared for prepared in batch if prepared.client_id or prepared.idempotency_key]
        for chunk in chunked(named):
            ids = [prepared.client_id for prepared in chunk if prepared.client_id]
            keys = [prepared.idempotency_key for prepared in chunk if prepared.idempotency_key]
            columns = (feedback.c.id, feedback.c.idempotency_key, feedback.c.fingerprint, feedback.c.pair_id)
            taken = select(*columns).where(or_(feedback.c.id.in_(ids), feedback.c.idempotency_key.in_(keys)))
            for row in connection.execute(taken):
                self.add(_Record(row.id, row.fingerprint, row.pair_id), row.idempotency_key)

    def add(self, record: _Record, idempotency_key: str | None) -> None:
        self._by_id[record.id] = record
        if idempotency_key:
            self._by_key[idempotency_key] = record

    def find(self, prepared: Prepared) -> tuple[_Record | None, str]:
        """The record that the item repeats, and the name of what repeats."""
        if prepared.client_id in self._by_id:
            return self._by_id[prepared.client_id], "id"
        return self._by_key.get(prepared.idempotency_key or ""), "Idempotency-Key"


def _admit(prepared: Prepared, known: _Known, responses: Responses, config: FeedbackConfig) -> bool:
    """True for a new and valid item; otherwise its status or error is set."""
    try:
        if _is_duplicate(prepared, known):
            return False
        _resolve(prepared, responses, config)
    except FeedbackError as error:
        prepared.error = error
        return False
    pair_id = _new_id("pair") if prepared.draft else None
    prepared.record = _Record(prepared.client_id or _new_id("fb"), prepared.fingerprint, pair_id)
    known.add(prepared.record, prepared.idempotency_key)
    return True


def _is_duplicate(prepared: Prepared, known: _Known) -> bool:
    """A repetition must repeat the content too: answering 'duplicate' to other content would lose it silently."""
    record, param = known.find(prepared)
    if record is None:
        return False
    if record.fingerprint != prepared.fingerprint:
        raise InvalidFeedbackError(f"this {param} was already used for a record with other content", param)
    prepared.status, prepared.record = "duplicate", record
    return True


def _resolve(prepared: Prepared, responses: Responses, config: FeedbackConfig) -> None:
    item = prepared.item
    if isinstance(item, PreferenceByIds):
        prepared.draft = pair_from_ids(item, responses.get, config)
    elif isinstance(item, Rating | Correction | Comment) and item.refs:
        prepared.response = found_response(item.refs[0], responses.get, "response_id")
        if isinstance(item, Correction):
            prepared.draft = pair_from_correction(item.value, prepared.response, config.max_text_chars)


def _insert_feedback(connection: Connection, fresh: list[Prepared], now: float) -> list[Prepared]:
    """Insert, and return those that are really new: on PostgreSQL another process may have been faster."""
    rows = [_feedback_row(prepared, now) for prepared in fresh]
    inserted = insert_new(connection, feedback, rows, feedback.c.id)
    lost = [prepared for prepared in fresh if prepared.record and prepared.record.id not in inserted]
    winners = _Known(connection, lost)
    for prepared in lost:
        try:
            if not _is_duplicate(prepared, winners):
                raise StoreUnavailableError("the record that came in between was removed again; please repeat")
        except FeedbackError as error:
            prepared.error = error
    return [prepared for prepared in fresh if prepared.record and prepared.record.id in inserted]


def _feedback_row(prepared: Prepared, now: float) -> dict[str, Any]:
    assert prepared.record is not None
    assert prepared.item is not None
    return {
        "id": prepared.record.id,
        "idempotency_key": prepared.idempotency_key,
        "fingerprint": prepared.fingerprint,
        "type": prepared.item.type,
        "user_id": prepared.item.user,
        "raw": prepared.raw_json,
        "pair_id": prepared.record.pair_id,
        "created_at": now if prepared.item.created_at is None else prepared.item.created_at,
        "received_at": now,
    }


def _settle_rating(connection: Connection, prepared: Prepared, config: FeedbackConfig, now: float) -> None:
    item, response, record = prepared.item, prepared.response, prepared.record
    assert isinstance(item, Rating)
    assert response is not None
    assert record is not None
    pair_id = _new_id("pair")
    match = put_rating(connection, record.id, item, response, pair_id=pair_id, config=config, now=now)
    if match is None:
        return
    draft, partner_id = match
    put_pairs(connection, [(pair_id, draft, item)], config.holdout_fraction, now)
    both = update(feedback).where(feedback.c.id.in_([record.id, partner_id]))
    connection.execute(both.values(pair_id=pair_id))
    record.pair_id = pair_id


def _fingerprint(raw: object) -> str:
    """Hash of the content; `created_at` is left out, because clients stamp a retry anew."""
    content = {key: value for key, value in raw.items() if key != "created_at"} if isinstance(raw, dict) else raw
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _new_id(prefix: str) -> str:
    """Unique, and growing with time: neighbours in time are neighbours in the index, which keeps inserts fast."""
    return f"{prefix}-{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex[:20]}"
