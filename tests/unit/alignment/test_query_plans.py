"""No query that runs all the time may cost more in a larger store: SQLite's plans, and what they must not say."""

import random
import re
import sqlite3

import pytest
from sqlalchemy import event

from alignment.store.feedback_store import FeedbackStore
from alignment.store.pairs import QualityChange
from core.alignment_config import FeedbackConfig
from core.types import PairScore

SIZE = 600
CALLS = {
    "new": lambda store, ids: store.sampling.new_pairs(8),
    "new, worst": lambda store, ids: store.sampling.new_pairs(8, order="loss"),
    "hard": lambda store, ids: store.sampling.hard_pairs(8, 10),
    "hard, behind": lambda store, ids: store.sampling.hard_pairs(8, 10, since_seq=5),
    "new, behind": lambda store, ids: store.sampling.new_pairs(8, since_seq=5),
    "replay": lambda store, ids: store.sampling.replay_pairs(8, 10, since_seq=5),
    "held out": lambda store, ids: store.sampling.held_out(8, 8, since_seq=5)[1],
    "unscored": lambda store, ids: store.sampling.unscored_pairs(8),
    "newest scored": lambda store, ids: store.sampling.newest_scored(8),
    "stale": lambda store, ids: store.sampling.stale_pairs(8, "v0002"),
    "find": lambda store, ids: store.pairs.find(ids[:8]),
    "matches": lambda store, ids: store.matches.find([store.pairs.find(ids[:1])[0].pair_key]),
    "bands": lambda store, ids: store.matches.band_matches(["band"]),
    "shares": lambda store, ids: store.matches.user_share(8),
    "user": lambda store, ids: store.matches.user_scores("u1", 8),
    "events": lambda store, ids: [*store.loop.drift_events(8), *store.loop.drift_events(8, "global"), 1],
    "relearn": lambda store, ids: store.pairs.to_relearn(5, SIZE, 8),
    "model": lambda store, ids: [store.models.served(), 1],
    "page": lambda store, ids: store.feedback.page(limit=8, type="preference").entries,
    "ratings": lambda store, ids: [store.feedback.rating_counts(1e9)],
}
WRITES = {
    "scores": lambda store, ids: store.pairs.record_scores(
        [PairScore(ids[0], -1, -2, -1, -2, 0.3, 0.1)], "v1", {ids[0]: "k"}
    ),
    "trained": lambda store, ids: store.pairs.mark_trained(ids[:8]),
    "quality": lambda store, ids: store.pairs.set_quality([QualityChange(ids[0], 0.5, ("copy",))]),
    "bands": lambda store, ids: store.matches.put_bands([("band", 3)]),
    "delete": lambda store, ids: store.feedback.delete("item-1"),
    "add": lambda store, ids: store.feedback.add([{"prompt": "x", "chosen": "a", "rejected": "b"}]),
    "state": lambda store, ids: store.loop.save_state("x", 1),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plans")
    store = FeedbackStore.open(FeedbackConfig(holdout_fraction=0.2), directory)
    items = [
        {"id": f"item-{n}", "prompt": f"p{n}", "chosen": "a", "rejected": "b", "user": f"u{n % 7}"}
        for n in range(SIZE)
    ]
    ids = [outcome.pair_id for outcome in store.feedback.add(items)]
    chooser = random.Random(0)
    scores = [PairScore(pair_id, -1, -2, -1, -2, chooser.random(), 0.1) for pair_id in ids[: SIZE - 100]]
    store.pairs.record_scores(scores, "v1")
    for count in (400, 200, 100):
        store.pairs.mark_trained(ids[:count])
    store.matches.put_bands([("band", 1), ("band", 2)])
    yield store, ids, directory / "feedback.db"
    store.close()


def plans(store, path, call):
    """The plans of all statements of a call."""
    seen = []

    def remember(connection, cursor, statement, parameters, context, executemany):
        seen.append((statement, parameters[0] if executemany else parameters))

    event.listen(store.database.engine, "before_cursor_execute", remember)
    try:
        result = call()
    finally:
        event.remove(store.database.engine, "before_cursor_execute", remember)
    with sqlite3.connect(path) as connection:
        found = []
        for statement, parameters in seen:
            if statement.startswith(("SELECT", "UPDATE", "DELETE")):
                rows = connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
                found.append((statement, [row[3] for row in rows]))
    return result, found


def is_bounded(statement, step):
    """A search in an index, or a walk along one that a LIMIT ends; no sort."""
    if step.startswith("USE TEMP B-TREE"):
        return "GROUP BY ratings" in statement  # of a range of times
    if step.startswith("SCAN anon"):
        return True  # of a limited subquery
    if step.startswith("SCAN"):
        return "LIMIT" in statement and ("USING INDEX" in step or re.search(r"ORDER BY \w+\.seq DESC", statement))
    return step.startswith(("SEARCH", "SCALAR SUBQUERY", "CO-ROUTINE", "LIST SUBQUERY"))


@pytest.mark.parametrize("name", CALLS)
def test_hot_reads_search_an_index(filled, name):
    store, ids, path = filled
    result, found = plans(store, path, lambda: CALLS[name](store, ids))
    assert result
    assert found
    for statement, steps in found:
        assert all(is_bounded(statement, step) for step in steps), (statement, steps)


@pytest.mark.parametrize("name", WRITES)
def test_hot_writes_search_an_index(filled, name):
    store, ids, path = filled
    _, found = plans(store, path, lambda: WRITES[name](store, ids))
    for statement, steps in found:
        assert all(is_bounded(statement, step) for step in steps), (statement, steps)


def test_each_kind_of_pair_has_its_own_index(filled):
    store, ids, path = filled
    expected = {"new": "level", "new, worst": "loss", "hard": "loss", "replay": "level", "held out": "heldout"}
    expected |= {
        "unscored": "unscored",
        "newest scored": "scored",
        "stale": "scored",
        "user": "user",
        "relearn": "scored",
    }
    for name, index in expected.items():
        _, found = plans(store, path, lambda name=name: CALLS[name](store, ids))
        steps = [step for _, steps in found for step in steps]
        assert any(re.search(rf"ix_pairs_{index}\b", step) for step in steps), (name, steps)
