"""Ratings: thumbs become pairs, one up and one down on the same prompt.

Rule. A rating takes as partner the newest rating of the other direction that

- answers the same normalised prompt with another text,
- is by the same user (ratings without a user pair among themselves),
- is among the newest `RATING_WINDOW` ratings of all, by order of arrival and not by the clock, which may jump, and
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

from alignment.records.feedback import Rating
from alignment.records.json_checks import canonical_json
from alignment.records.pairs import PairDraft, StoredResponse, checked_pair, prompt_key
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
    new, old = (response.text, response.adapter), (partner.text, partner.adapter)
    chosen, rejected = (new, old) if item.value > 0 else (old, new)
    draft = PairDraft(json.loads(partner.prompt), chosen[0], rejected[0], chosen[1], rejected[1])
    return draft, partner.feedback_id


def drop_rating(connection: Connection, feedback_id: str, pair_id: str | None) -> None:
    """Forget one rating; if it was paired, its partner is open again."""
    connection.execute(delete(ratings).where(ratings.c.feedback_id == feedback_id))
    if pair_id is not None:
        reopened = update(ratings).where(ratings.c.pair_id == pair_id)
        connection.execute(reopened.values(state=OPEN, pair_id=None))


def _row(
    feedback_id: str, item: Rating, response: StoredResponse, config: FeedbackConfig, now: float
) -> dict[str, Any]:
    text = response.text.strip()
    return {
        "feedback_id": feedback_id,
        "response_id": response.response_id,
        "choice_index": response.choice_index,
        "direction": item.value,
        "user_id": item.user or "",
        "prompt": canonical_json(response.prompt),
        "prompt_key": prompt_key(response.prompt),
        "text": response.text,
        "text_key": hashlib.sha256(text.encode()).hexdigest(),
        "adapter": response.adapter,
        "state": OPEN if _is_usable(response, config) else UNUSABLE,
        "pair_id": None,
        "received_at": now,
    }


def _is_usable(response: StoredResponse, config: FeedbackConfig) -> bool:
    """True if this response can ever be half of a pair. Checked against a dummy that differs from it."""
    probe = PairDraft(response.prompt, response.text, "-" if response.text.strip() != "-" else "+")
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
