"""Which base model the store's knowledge of pairs is of, and what it knew with others.

How often a pair was trained, what it scored and why it was parked say something about one base model only, and so do
the states of the alignment loop. The columns of `pairs` are about the model that is served. When another one is, they
go to `pair_pasts` under the fingerprint of theirs, and what is kept there of the new one comes back: a model that was
never served sees every pair as new, and one that is served again goes on from where it was.
"""

from typing import Any

from sqlalchemy import ColumnElement, case, delete, insert, literal, or_, select, update
from sqlalchemy.engine import Connection

from alignment.records.json_checks import canonical_json
from alignment.store.database import Part, reads, writes
from alignment.store.pairs import LEFT_OUT, PARKED, PENDING
from alignment.store.schema import loop_state, pair_pasts, pairs

_KEY = "base_model"
_OF = "/"
"""Between a fingerprint and the name of a loop state that was kept with it."""
_NEW: dict[str, Any] = {
    "times_trained": 0,
    "scored": False,
    "scored_version": None,
    "scored_at": None,
    "last_loss": None,
    "last_margin": None,
    "state": PENDING,
    "park_reason": None,
}
"""What a model knows of a pair that it never saw."""


class ModelMemory(Part):
    """The model behind the columns of `pairs`, by its fingerprint (`engine.fingerprint`)."""

    @reads
    def served(self, connection: Connection) -> str | None:
        """The fingerprint of the model that was served last; None before anyone said."""
        return _served(connection)

    @writes
    def begin(self, connection: Connection, fingerprint: str) -> bool:
        """Serve this model from now on; True if another one was. Walks the whole table then.

        A store that does not know of which model it is takes the first for its own.
        """
        before = _served(connection)
        if before == fingerprint:
            return False
        if before is None:
            row = {"key": _KEY, "value": canonical_json(fingerprint), "updated_at": self.database.clock()}
            connection.execute(insert(loop_state), row)
            return False
        _put_away(connection, before)
        _bring_back(connection, fingerprint)
        this = update(loop_state).where(loop_state.c.key == _KEY)
        connection.execute(this.values(value=canonical_json(fingerprint), updated_at=self.database.clock()))
        return True


def _served(connection: Connection) -> str | None:
    value = connection.execute(select(loop_state.c.value).where(loop_state.c.key == _KEY)).scalar_one_or_none()
    return None if value is None else value.strip('"')


def _kept_out(state: ColumnElement[str]) -> ColumnElement[str]:
    """The state of a pair, unless it was left out on purpose, which no model changes."""
    return case((pairs.c.state == LEFT_OUT, LEFT_OUT), else_=state)


def _put_away(connection: Connection, fingerprint: str) -> None:
    is_known = or_(pairs.c.times_trained > 0, pairs.c.scored, pairs.c.state == PARKED)
    names = ["fingerprint", "pair_seq", *_NEW]
    known = select(literal(fingerprint), pairs.c.seq, *(pairs.c[name] for name in _NEW)).where(is_known)
    connection.execute(insert(pair_pasts).from_select(names, known))
    connection.execute(update(pairs).where(is_known).values({**_NEW, "state": _kept_out(literal(PENDING))}))
    mine = update(loop_state).where(loop_state.c.key != _KEY, ~loop_state.c.key.contains(_OF))
    connection.execute(mine.values(key=literal(f"{fingerprint}{_OF}").concat(loop_state.c.key)))


def _bring_back(connection: Connection, fingerprint: str) -> None:
    of_it = pair_pasts.c.fingerprint == fingerprint
    back = update(pairs).where(pairs.c.seq == pair_pasts.c.pair_seq, of_it)
    state = _kept_out(case((pair_pasts.c.state == LEFT_OUT, PENDING), else_=pair_pasts.c.state))
    connection.execute(back.values({**{name: pair_pasts.c[name] for name in _NEW}, "state": state}))
    connection.execute(delete(pair_pasts).where(of_it))
    prefix = f"{fingerprint}{_OF}"
    kept = select(loop_state.c.key).where(loop_state.c.key.startswith(prefix, autoescape=True))
    for key in connection.execute(kept).scalars().all():
        this = update(loop_state).where(loop_state.c.key == key)
        connection.execute(this.values(key=key.removeprefix(prefix)))
