"""Ratings: thumbs become pairs, one up and one down on the same prompt.

Rule. A rating takes as partner the newest rating of the other direction that

- answers the same normalised prompt with another text,
- is by the same user (ratings without a user pair among themselves),
- is among the newest `RATING_WINDOW` ratings of all, by order of arrival and not by the clock, which may jump,
- is not the better one although it was cut off (`FeedbackConfig.cut_off_as_chosen`), and
- is still open: every rating is used at most once.

A user's newest rating of a response replaces the older one, so a changed mind never trains both ways. A lone thumb
stays open; no answer is ever invented for it.

Functions take the connection of the caller's transaction.
"""

import hashlib
import json
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.engine import Connection, Row

from alignment.records.chat import answer_text
from alignment.records.feedback import Rating
from alignment.records.pairs import PairDraft, StoredResponse, checked_pair, may_be_chosen, pair_of, prompt_key
from alignment.store.database import decoded, decoded_ids, encoded, ordered_json
from alignment.store.schema import ratings
from core.alignment_config import FeedbackConfig
from core.errors import InvalidFeedbackError

RATING_WINDOW = 100_000
"""Ratings that may lie between the two of a pair: as many as answers are kept, by default."""
OPEN, PAIRED, REPLACED, UNUSABLE = "open", "paired", "replaced", "unusable"


def put_rating(
    connection: Connection,
    feedback_id: str,
    item: Rating,
    response: StoredResponse,
    *,
    pair_id: str,
    config: FeedbackConfig,
    now: float,
) -> tuple[PairDraft, str] | None:
    """Store one rating and find its partner; both are then marked as used by `pair_id`.

    Returns the pair that they make and the partner's feedback id; None if the rating stays alone.
    """
    row = _row(feedback_id, item, response, config, now)
    _replace_older(connection, row)
    partner = _claim_partner(connection, row, pair_id) if row["state"] == OPEN else None
    if partner is not None:
        row |= {"state": PAIRED, "pair_id": pair_id}
    connection.execute(insert(ratings), row)
    if partner is None:
        return None
    old = StoredResponse(
        partner.response_id,
        partner.choice_index,
        json.loads(partner.prompt),
        partner.text,
        partner.adapter,
        tools=decoded(partner.tools),
        tool_calls=decoded(partner.tool_calls),
        token_ids=decoded_ids(partner.token_ids),
    )
    chosen, rejected = (response, old) if item.value > 0 else (old, response)
    return pair_of(chosen, rejected), partner.feedback_id


def drop_rating(connection: Connection, feedback_id: str, pair_id: str | None) -> None:
    """Forget one rating; if it was paired, its partner is open again."""
    connection.execute(delete(ratings).where(ratings.c.feedback_id == feedback_id))
    if pair_id is not None:
        reopened = update(ratings).where(ratings.c.pair_id == pair_id)
        connection.execute(reopened.values(state=OPEN, pair_id=None))


def _row(
    feedback_id: str, item: Rating, response: StoredResponse, config: FeedbackConfig, now: float
) -> dict[str, Any]:
    text = answer_text(response.text, response.tool_calls).strip()
    return {
        "feedback_id": feedback_id,
        "response_id": response.response_id,
        "choice_index": response.choice_index,
        "direction": item.value,
        "user_id": item.user or "",
        "prompt": ordered_json(response.prompt),
        "prompt_key": prompt_key(response.prompt, response.tools),
        "tools": encoded(response.tools),
        "tool_calls": encoded(response.tool_calls),
        "token_ids": encoded(response.token_ids),
        "text": response.text,
        "text_key": hashlib.sha256(text.encode()).hexdigest(),
        "adapter": response.adapter,
        "state": OPEN if _is_usable(response, item, config) else UNUSABLE,
        "pair_id": None,
        "received_at": now,
    }


def _is_usable(response: StoredResponse, item: Rating, config: FeedbackConfig) -> bool:
    """True if this response can ever be its half of a pair. Checked against a dummy that differs from it."""
    other = StoredResponse("", 0, response.prompt, "-" if response.text.strip() != "-" else "+")
    probe = pair_of(response, other)
    if item.value > 0 and not may_be_chosen(response, config):
        return False
    try:
        checked_pair(probe, config.max_text_chars, ("prompt", "text", "probe"))
    except InvalidFeedbackError:
        return False
    return True


def _replace_older(connection: Connection, row: dict[str, Any]) -> None:
    older = update(ratings).where(
        ratings.c.response_id == row["response_id"],
        ratings.c.choice_index == row["choice_index"],
        ratings.c.user_id == row["user_id"],
        ratings.c.state == OPEN,
    )
    connection.execute(older.values(state=REPLACED))


def _claim_partner(connection: Connection, row: dict[str, Any], pair_id: str) -> Row[Any] | None:
    """The update repeats the condition: on PostgreSQL another process may have claimed the partner meanwhile."""
    newest = select(func.max(ratings.c.seq)).scalar_subquery()
    candidates = (
        select(ratings)
        .where(
            ratings.c.prompt_key == row["prompt_key"],
            ratings.c.user_id == row["user_id"],
            ratings.c.direction == -row["direction"],
            ratings.c.state == OPEN,
            ratings.c.text_key != row["text_key"],
            ratings.c.seq > newest - RATING_WINDOW,
        )
        .order_by(ratings.c.seq.desc())
        .limit(8)
    )
    for partner in connection.execute(candidates).all():
        claim = update(ratings).where(ratings.c.seq == partner.seq, ratings.c.state == OPEN)
        if connection.execute(claim.values(state=PAIRED, pair_id=pair_id)).rowcount == 1:
            return partner
    return None
