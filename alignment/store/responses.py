"""The bounded memory of what we answered, so that feedback can name a response by its id."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.engine import Connection

from alignment.records.chat import MAX_NAME_CHARS, plain_prompt
from alignment.records.feedback import ResponseRef
from alignment.records.json_checks import canonical_json, check_json, is_storable
from alignment.records.pairs import StoredResponse
from alignment.store.database import Database, Part, chunked, insert_new, reads, writes
from alignment.store.schema import responses
from core.errors import InvalidFeedbackError


class ResponseStore(Part):
    """Keeps about the newest `max_responses` choices: at most 5 % more."""

    def __init__(self, database: Database, max_responses: int) -> None:
        super().__init__(database)
        self._max_responses = max_responses
        self._puts_since_trim = max_responses

    @writes
    def put(self, connection: Connection, items: Sequence[StoredResponse]) -> int:
        """Remember responses; returns how many are new. One that is there already is kept as it is.

        Ids or texts that cannot be stored are skipped.
        """
        rows = [_row(item, self.database.clock()) for item in items if _is_storable(item)]
        stored = len(insert_new(connection, responses, rows, responses.c.seq))
        self._puts_since_trim += stored
        if self._puts_since_trim > self._max_responses // 20:  # now and then, since it walks the whole index
            self._puts_since_trim = 0
            newest_first = select(responses.c.seq).order_by(responses.c.seq.desc())
            newest_to_drop = newest_first.offset(self._max_responses).limit(1).scalar_subquery()
            connection.execute(delete(responses).where(responses.c.seq <= newest_to_drop))
        return stored

    @reads
    def count(self, connection: Connection) -> int:
        """Stored choices."""
        return int(connection.execute(select(func.count()).select_from(responses)).scalar_one())


def find_responses(connection: Connection, refs: Collection[ResponseRef]) -> dict[ResponseRef, StoredResponse]:
    """Those of `refs` that are stored, in the caller's transaction."""
    found = {}
    for ids in chunked({ref.response_id for ref in refs if is_storable(ref.response_id)}):
        for row in connection.execute(select(responses).where(responses.c.response_id.in_(ids))):
            ref = ResponseRef(row.response_id, row.choice_index)
            prompt = json.loads(row.prompt)
            found[ref] = StoredResponse(*ref, prompt, row.text, row.adapter, row.model, row.created_at)
    return found


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
    created_at = now if item.created_at is None else item.created_at
    return {**asdict(item), "prompt": canonical_json(plain_prompt(item.prompt)), "created_at": created_at}
