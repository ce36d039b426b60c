"""The bounded memory of what we answered, so that feedback can name a response by its id."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.engine import Connection

from alignment.records.chat import MAX_NAME_CHARS, plain_prompt
from alignment.records.feedback import ResponseRef
from alignment.records.json_checks import check_json, is_storable
from alignment.records.pairs import ALL_CHOICES, EVICTED, RUNNING, StoredResponse
from alignment.records.response_ids import may_be_running
from alignment.store.database import (
    Database,
    Part,
    chunked,
    decoded,
    decoded_ids,
    encoded,
    insert_new,
    ordered_json,
    reads,
    writes,
)
from alignment.store.schema import responses, unusable_responses
from core.errors import InvalidFeedbackError


class ResponseStore(Part):
    """Keeps about the newest `max_responses` choices, at most 5 % more, and as many reasons for what is not kept."""

    def __init__(self, database: Database, max_responses: int) -> None:
        super().__init__(database)
        self._max_responses = max_responses
        self._puts_since_trim = max_responses

    @writes
    def put(self, connection: Connection, items: Sequence[StoredResponse]) -> int:
        """Remember responses; returns how many can be rated and are new. One that is there already is kept as it is.

        Of one that is `unusable`, or cannot be stored, the reason is remembered. Ids that feedback could not name are
        skipped.
        """
        items = [_storable(item) for item in items if _is_name(item.response_id)]
        rows = [_row(item, self.database.clock()) for item in items if item.unusable is None]
        reasons = [
            {"response_id": item.response_id, "choice_index": item.choice_index, "reason": item.unusable}
            for item in items
            if item.unusable is not None
        ]
        stored = len(insert_new(connection, responses, rows, responses.c.seq))
        insert_new(connection, unusable_responses, reasons, unusable_responses.c.seq)
        self._puts_since_trim += len(items)
        if self._puts_since_trim > self._max_responses // 20:  # now and then, since it walks the whole index
            self._puts_since_trim = 0
            self._trim(connection)
        return stored

    @reads
    def count(self, connection: Connection) -> int:
        """Stored choices."""
        return int(connection.execute(select(func.count()).select_from(responses)).scalar_one())

    def _trim(self, connection: Connection) -> None:
        """Drop the oldest, and remember of answers that they were there."""
        for table in (responses, unusable_responses):
            newest_first = select(table.c.seq).order_by(table.c.seq.desc())
            last = connection.execute(newest_first.offset(self._max_responses).limit(1)).scalar()
            if last is None:
                continue
            if table is responses:
                dropped = connection.execute(select(table.c.response_id).where(table.c.seq <= last).distinct())
                insert_new(
                    connection,
                    unusable_responses,
                    [
                        {"response_id": name, "choice_index": ALL_CHOICES, "reason": EVICTED}
                        for name in dropped.scalars()
                    ],
                    unusable_responses.c.seq,
                )
            connection.execute(delete(table).where(table.c.seq <= last))


def find_responses(
    connection: Connection, refs: Collection[ResponseRef], now: float
) -> dict[ResponseRef, StoredResponse]:
    """What is known of `refs` at `now` (Unix seconds), in the caller's transaction.

    One that cannot be rated, or whose request may still run, has the reason in `unusable`.
    """
    found = {}
    for ids in chunked({ref.response_id for ref in refs if is_storable(ref.response_id)}):
        for row in connection.execute(select(responses).where(responses.c.response_id.in_(ids))):
            ref = ResponseRef(row.response_id, row.choice_index)
            found[ref] = StoredResponse(
                *ref,
                json.loads(row.prompt),
                row.text,
                row.adapter,
                row.model,
                row.created_at,
                row.finish_reason,
                decoded(row.tools),
                decoded(row.tool_calls),
                decoded_ids(row.token_ids),
                row.client_id,
            )
    missing = set(refs) - found.keys()
    reasons: dict[ResponseRef, str] = {}
    for ids in chunked({ref.response_id for ref in missing if is_storable(ref.response_id)}):
        unusable = select(unusable_responses).where(unusable_responses.c.response_id.in_(ids))
        for row in connection.execute(unusable):
            reasons[ResponseRef(row.response_id, row.choice_index)] = row.reason
    known = {ref.response_id for ref in found}
    for ref in missing:
        reason = reasons.get(ref) or reasons.get(ResponseRef(ref.response_id, ALL_CHOICES))
        if reason is None and ref.response_id not in known and may_be_running(ref.response_id, now):
            reason = RUNNING
        if reason is not None:
            found[ref] = StoredResponse(*ref, unusable=reason)
    return found


def _is_name(response_id: str) -> bool:
    return 0 < len(response_id) <= MAX_NAME_CHARS and is_storable(response_id)


def _storable(item: StoredResponse) -> StoredResponse:
    """`item`, or the reason why it has no place in a database."""
    try:
        check_json([item.prompt, item.text, item.tools, item.tool_calls])
    except InvalidFeedbackError as error:
        return StoredResponse(item.response_id, item.choice_index, unusable=f"cannot be stored: {error}")
    return item


def _row(item: StoredResponse, now: float) -> dict[str, Any]:
    row = asdict(replace(item, created_at=now if item.created_at is None else item.created_at))
    del row["unusable"]
    return row | {
        "prompt": ordered_json(plain_prompt(item.prompt)),
        "tools": encoded(item.tools),
        "tool_calls": encoded(item.tool_calls),
        "token_ids": encoded(item.token_ids),
    }
