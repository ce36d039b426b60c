"""Databases of older releases are brought up to date in place, and nothing in them is lost."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine, inspect, select, text

from alignment.records.pairs import pair_key
from alignment.store import migrations
from alignment.store.feedback_store import FeedbackStore
from alignment.store.schema import meta, metadata
from core.alignment_config import FeedbackConfig
from core.errors import ConfigError, StoreUnavailableError
from core.types import PairScore

PROMPT = [{"role": "user", "content": "Hi?"}]


def feedback_row(number, raw, kind="preference", pair_id=None):
    return {
        "id": f"fb-{number}",
        "idempotency_key": f"key#{number}",
        "fingerprint": "f" * 64,
        "type": kind,
        "user_id": raw.get("user"),
        "raw": json.dumps(raw),
        "pair_id": pair_id,
        "created_at": 5.0,
        "received_at": 6.0,
    }


def pair_row(number, split="train", **extra):
    return {
        "pair_id": f"pair-{number}",
        "origin": "preference",
        "user_id": "ann",
        "prompt": json.dumps(PROMPT),
        "prompt_key": "p" * 64,
        "chosen": f"good {number}",
        "rejected": "bad",
        "weight": 2.0,
        "split": split,
        "state": "pending",
        "created_at": 7.0,
        **extra,
    }


@pytest.fixture
def old_url(database_url, schema_1):
    """A database with something in every table of schema 1."""
    url = database_url("old")
    engine = create_engine(url)
    trained = {
        "times_trained": 3,
        "scored": True,
        "scored_version": "v0007",
        "last_loss": 0.25,
        "last_margin": 1.5,
    }
    rating = {"feedback_id": "fb-9", "response_id": "r", "choice_index": 0, "direction": 1, "user_id": ""}
    rating |= {
        "prompt": "[]",
        "prompt_key": "k",
        "text": "t",
        "text_key": "t",
        "state": "open",
        "received_at": 8.0,
    }
    response = {"response_id": "r", "choice_index": 0, "prompt": '"p"', "text": "answer", "created_at": 9.0}
    preference = {"prompt": PROMPT, "chosen": "good 0", "rejected": "bad", "tags": {"team": "blue"}, "user": "ann"}
    with engine.begin() as connection:
        schema_1["meta"].metadata.create_all(connection)
        connection.execute(schema_1["meta"].insert(), {"key": "schema_version", "value": "1"})
        connection.execute(schema_1["feedback"].insert(), [feedback_row(0, preference, pair_id="pair-0")])
        connection.execute(schema_1["feedback"].insert(), [feedback_row(9, {"type": "rating"}, "rating")])
        for row in (
            pair_row(0, **trained),
            pair_row(1, state="parked", park_reason="too long"),
            pair_row(2, split="heldout"),
            pair_row(3),
        ):
            connection.execute(schema_1["pairs"].insert(), row)
        connection.execute(schema_1["ratings"].insert(), rating)
        connection.execute(schema_1["responses"].insert(), response)
    engine.dispose()
    return url


def config(url):
    return FeedbackConfig(database_url=url, holdout_fraction=0.0)


def shape(engine):
    """Columns with type and nullability, and indexes with columns and condition, by table."""
    inspector = inspect(engine)
    tables = {}
    for name in inspector.get_table_names():
        columns = {one["name"]: (str(one["type"]), one["nullable"]) for one in inspector.get_columns(name)}
        indexes = {}
        for one in inspector.get_indexes(name):
            conditions = {
                key: str(value) for key, value in one["dialect_options"].items() if key.endswith("where")
            }
            indexes[one["name"]] = (one["column_names"], conditions, bool(one["unique"]))
        tables[name] = (columns, indexes)
    return tables


def test_a_database_of_schema_1_keeps_everything(old_url, tmp_path, response_of):
    store = FeedbackStore.open(config(old_url), tmp_path)
    trained, parked, held_out, fresh = store.pairs.find([f"pair-{number}" for number in range(4)])
    assert (trained.times_trained, trained.last_loss, trained.scored_version) == (3, 0.25, "v0007")
    assert (trained.user, trained.weight, trained.created_at, trained.prompt) == ("ann", 2.0, 7.0, PROMPT)
    assert (trained.tags, trained.quality, trained.reference) == ({"team": "blue"}, 1.0, None)
    assert trained.pair_key == pair_key(PROMPT, "good 0", "bad")
    assert (parked.state, parked.park_reason, held_out.split) == ("parked", "too long", "heldout")
    assert store.feedback.get("fb-0").item["tags"] == {"team": "blue"}
    assert response_of(store, "r").text == "answer"
    assert store.counts().feedback == {"preference": 1, "rating": 1}
    assert store.feedback.rating_counts(0.0) == {None: (1, 0)}
    # and it works on
    assert [pair.pair_id for pair in store.sampling.unscored_pairs(9)] == [fresh.pair_id, held_out.pair_id]
    assert [pair.pair_id for pair in store.sampling.replay_pairs(9, 10)] == [trained.pair_id]
    assert [pair.pair_id for pair in store.sampling.held_out(9, 0)[0]] == [held_out.pair_id]
    assert [one.pair_id for one in store.matches.find([trained.pair_key])[trained.pair_key]] == [trained.pair_id]
    store.pairs.record_scores(
        [PairScore(fresh.pair_id, -1, -2, -1, -2, 0.5, 0.1)], "v0008", {fresh.pair_id: "key"}
    )
    [added] = store.feedback.add([{"prompt": "new", "chosen": "a", "rejected": "b"}], idempotency_key="key2")
    assert store.pairs.find([added.pair_id])[0].seq > fresh.seq
    store.close()


def test_a_migrated_database_has_the_shape_of_a_new_one(old_url, database_url, tmp_path):
    FeedbackStore.open(config(old_url), tmp_path).close()
    FeedbackStore.open(config(database_url("new")), tmp_path).close()
    shapes = []
    for url in (old_url, database_url("new")):
        engine = create_engine(url)
        shapes.append(shape(engine))
        engine.dispose()
    assert shapes[0] == shapes[1]
    assert set(shapes[1]) == set(metadata.tables)


def test_texts_and_times_of_schema_2_are_read_as_they_were(old_url, schema_1, tmp_path, response_of):
    engine = create_engine(old_url)
    odd, far = "a\x1a0b\x1a1c\x1a", 1_735_689_600_123.0
    with engine.begin() as connection:
        connection.execute(schema_1["pairs"].insert(), [pair_row(50) | {"chosen": odd, "rejected": odd + "!"}])
        response = {"response_id": "odd", "choice_index": 0, "prompt": '"p"', "text": odd, "created_at": 9.0}
        connection.execute(schema_1["responses"].insert(), response)
        connection.execute(schema_1["feedback"].insert(), [feedback_row(50, {}) | {"created_at": far}])
    engine.dispose()
    store = FeedbackStore.open(config(old_url), tmp_path)
    [pair] = store.pairs.find(["pair-50"])
    assert (pair.chosen, pair.rejected, pair.tools, pair.chosen_calls) == (odd, odd + "!", None, None)
    response = response_of(store, "odd")
    assert (response.text, response.finish_reason, response.tools) == (odd, None, None)
    assert store.feedback.get("fb-50").created_at == 6.0
    store.close()


def test_a_failed_migration_leaves_the_old_database_as_it_was(old_url, tmp_path, monkeypatch):
    engine = create_engine(old_url)
    before = shape(engine)

    def fail(connection):
        connection.execute(text("SELECT * FROM nowhere"))

    def half(connection, original=migrations.STEPS[1]):
        original(connection)
        fail(connection)

    monkeypatch.setitem(migrations.STEPS, 1, half)
    with pytest.raises(StoreUnavailableError, match="nowhere"):
        FeedbackStore.open(config(old_url), tmp_path)
    assert shape(engine) == before
    with engine.connect() as connection:
        assert connection.execute(select(meta.c.value)).scalar() == "1"
    monkeypatch.undo()
    store = FeedbackStore.open(config(old_url), tmp_path)
    assert len(store.pairs.find(["pair-0", "pair-3"])) == 2
    store.close()
    engine.dispose()


def test_many_rows_are_migrated_in_chunks(old_url, schema_1, tmp_path, monkeypatch):
    monkeypatch.setattr(migrations, "_CHUNK", 3)
    engine = create_engine(old_url)
    with engine.begin() as connection:
        connection.execute(schema_1["pairs"].insert(), [pair_row(number) for number in range(10, 20)])
    engine.dispose()
    store = FeedbackStore.open(config(old_url), tmp_path)
    pairs = store.pairs.find([f"pair-{number}" for number in range(20)])
    assert [one.pair_key for one in pairs] == [pair_key(PROMPT, one.chosen, "bad") for one in pairs]
    assert len(pairs) == 14
    store.close()


def test_stores_that_open_at_once_migrate_once(old_url, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: FeedbackStore.open(config(old_url), tmp_path), range(4)))
    assert all(store.feedback.get("fb-0") for store in stores)
    for store in stores:
        store.close()


@pytest.mark.parametrize("version", ["99", "0", "two", ""])
def test_a_database_of_another_release_is_not_touched(open_store, version):
    store = open_store()
    store.database.write(lambda c: c.execute(meta.update().values(value=version)))
    with pytest.raises(ConfigError, match=f"schema {version}"):
        open_store()
