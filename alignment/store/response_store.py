"""The bounded memory of what we answered, so that feedback can name a response by its id.

Functions take the connection of the caller's transaction; `alignment.store.feedback_store` owns transactions.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.engine import Connection, Row

from alignment.records.feedback import ResponseRef
from alignment.records.json_checks import canonical_json, check_json, is_storable
from alignment.records.messages import MAX_NAME_CHARS
from alignment.records.pairs import StoredResponse, plain_prompt
from alignment.store.database import insert_new
from alignment.store.schema import responses
from core.errors import InvalidFeedbackError

_CHUNK = 400
"""Values in one IN list; SQLite's oldest limit is 999 parameters."""


def chunked(values: Iterable[Any], size: int = _CHUNK) -> Iterator[list[Any]]:
    """`values` in lists of at most `size`."""
    rest = iter(values)
    while chunk := list(islice(rest, size)):
        yield chunk


def put_responses(connection: Connection, items: Sequence[StoredResponse], now: float) -> int:
    """Insert what can be stored; a response that is there already is kept. Returns how many are new."""
    rows = [_row(item, now) for item in items if _is_storable(item)]
    return len(insert_new(connection, responses, rows, responses.c.seq))


def find_responses(connection: Connection, refs: Collection[ResponseRef]) -> dict[ResponseRef, StoredResponse]:
    """Those of `refs` that are stored."""
    found = {}
    for ids in chunked({ref.response_id for ref in refs if is_storable(ref.response_id)}):
        for row in connection.execute(select(responses).where(responses.c.response_id.in_(ids))):
            response = _from_row(row)
            found[ResponseRef(response.response_id, response.choice_index)] = response
    return found


def trim_responses(connection: Connection, max_responses: int) -> int:
    """Drop the oldest beyond `max_responses`; returns how many. Walks the whole index: call it now and then."""
    newest_to_drop = (
        select(responses.c.seq).order_by(responses.c.seq.desc()).offset(max_responses).limit(1).scalar_subquery()
    )
    return connection.execute(delete(responses).where(responses.c.seq <= newest_to_drop)).rowcount


def count_responses(connection: Connection) -> int:
    """Stored choices."""
    return int(connection.execute(select(func.count()).select_from(responses)).scalar_one())


def _is_storable(item: StoredResponse) -> bool:
    """Feedback could not name a longer id, and a text with lone surrogates or NUL has no place in a database."""
    if not 0 < len(item.response_id) <= MAX_NAME_CHARS:
        return False
    try:
        check_json([item.response_id, item.prompt, item.text, item.adapter, item.model])
    except InvalidFeedbackError:
        return False
    return True


def _row(item: StoredResponse, now: float) -> dict[str, Any]:
    return {
        "response_id": item.response_id,
        "choice_index": item.choice_index,
        "prompt": canonical_json(plain_prompt(item.prompt)),
        "text": item.text,
        "adapter": item.adapter,
        "model": item.model,
        "created_at": now if item.created_at is None else item.created_at,
    }


def _from_row(row: Row[Any]) -> StoredResponse:
    return StoredResponse(
        row.response_id, row.choice_index, json.loads(row.prompt), row.text, row.adapter, row.model, row.created_at
    )
