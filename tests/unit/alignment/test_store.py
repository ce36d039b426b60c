"""The store: outcomes, identity, ratings, listing, training order and state."""

import sqlite3
from typing import Any

import pytest
from sqlalchemy import event, insert

from alignment.formats import import_jsonl
from alignment.pairs import StoredResponse
from alignment.store import FeedbackStore
from core.config import FeedbackConfig
from core.errors import ConfigError, InvalidFeedbackError
from core.types import PairScore

ALL_TRAIN = FeedbackConfig(holdout_fraction=0.0)
USER = [{"role": "user", "content": "Hi?"}]


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = FeedbackStore.open(ALL_TRAIN, tmp_path, clock)
    yield store
    store.close()


def row(number: int, **extra: Any) -> dict[str, Any]:
    return {"prompt": f"p{number}", "chosen": "good", "rejected": "bad", **extra}


def score(pair_id: str, loss: float = 0.5, margin: float = 1.0) -> PairScore:
    return PairScore(pair_id, -1.0, -2.0, -1.0, -2.0, loss, margin)


def answer(store, response_id, text, prompt=USER, choice_index=0, adapter="v0001"):
    store.put_responses([StoredResponse(response_id, choice_index, prompt, text, adapter, "m")])


def rate(store, response_id, value, user=None, **extra):
    [outcome] = store.add([{"response_id": response_id, "value": value, "user": user, **extra}])
    assert outcome.status == "accepted", outcome
    return outcome


def test_a_bad_item_does_not_stop_the_good_ones(store):
    good, bad, unknown, other = store.add([row(1), {"prompt": 1}, {"chosen_id": "x", "rejected_id": "y"}, row(2)])
    assert (good.status, other.status) == ("accepted", "accepted")
    assert good.id
    assert good.pair_id
    assert (bad.status, bad.error_type, bad.id) == ("error", "InvalidFeedbackError", None)
    assert (unknown.error_type, unknown.param) == ("UnknownResponseError", "chosen_id")
    assert store.counts().feedback == {"preference": 2}
    assert unknown.to_wire()["message"].startswith("no stored response 'x'")


def test_the_same_id_is_one_record_and_answers_like_the_first(store):
    [first] = store.add([row(1, id="mine")])
    [again] = store.add([row(1, id="mine")])
    assert first.id == again.id == "mine"
    assert (again.status, again.pair_id) == ("duplicate", first.pair_id)
    batch = store.add([row(2, id="x"), row(2, id="x"), row(2, id="x", created_at=5)])
    assert [one.status for one in batch] == ["accepted", "duplicate", "duplicate"]
    assert len({one.pair_id for one in batch}) == 1
    assert store.counts().pairs["train"] == 2


def test_the_same_id_with_other_content_is_an_error_not_a_silent_loss(store):
    store.add([row(1, id="mine")])
    [other] = store.add([row(2, id="mine")])
    assert (other.status, other.param) == ("error", "id")
    assert "other content" in other.message


def test_an_idempotency_key_covers_each_item_of_a_list(store):
    first = store.add([row(1), row(1), {"type": "comment", "value": "x"}], idempotency_key="k")
    again = store.add([row(1), row(1), {"type": "comment", "value": "x"}], idempotency_key="k")
    assert [one.status for one in first] == ["accepted"] * 3
    assert [one.status for one in again] == ["duplicate"] * 3
    assert [one.id for one in first] == [one.id for one in again]
    [changed] = store.add([row(9)], idempotency_key="k")
    assert (changed.status, changed.param) == ("error", "Idempotency-Key")
    for key in ("", "x" * 201, "a\nb"):
        with pytest.raises(InvalidFeedbackError):
            store.add([row(1)], idempotency_key=key)


def test_a_retry_is_a_duplicate_even_if_its_responses_are_gone(tmp_path):
    store = FeedbackStore.open(FeedbackConfig(max_responses=2), tmp_path)
    answer(store, "a", "good")
    answer(store, "b", "bad")
    item = {"id": "once", "chosen_id": "a", "rejected_id": "b"}
    [first] = store.add([item])
    for number in range(3):
        answer(store, f"later{number}", "x")
    assert store.get_response("a") is None
    [again] = store.add([item])
    assert (again.status, again.pair_id) == ("duplicate", first.pair_id)


def test_too_many_items_are_refused_as_a_whole(tmp_path):
    store = FeedbackStore.open(FeedbackConfig(max_items=2), tmp_path)
    with pytest.raises(InvalidFeedbackError, match="limit is 2"):
        store.add([row(1)] * 3)
    assert store.add([]) == []


def test_pairs_know_which_adapter_versions_answered(store):
    answer(store, "a", "good", adapter="v0002")
    answer(store, "b", "bad", adapter=None)
    [outcome] = store.add([{"chosen_id": "a", "rejected_id": "b", "weight": 2, "user": "u"}])
    [pair] = store.find_pairs([outcome.pair_id])
    assert (pair.chosen_version, pair.rejected_version) == ("v0002", None)
    assert (pair.prompt, pair.chosen, pair.rejected) == (USER, "good", "bad")
    assert (pair.weight, pair.user, pair.origin, pair.created_at) == (2.0, "u", "preference", 1000.0)


def test_a_correction_makes_a_pair_and_a_comment_none(store):
    answer(store, "a", "original")
    correction, comment, lost = store.add(
        [
            {"type": "correction", "response_id": "a", "value": "edit"},
            {"type": "comment", "response_id": "a", "value": "hm"},
            {"type": "comment", "response_id": "nope", "value": "hm"},
        ]
    )
    [pair] = store.find_pairs([correction.pair_id])
    assert (pair.chosen, pair.rejected, pair.origin) == ("edit", "original", "correction")
    assert (comment.status, comment.pair_id) == ("accepted", None)
    assert lost.error_type == "UnknownResponseError"


def test_an_up_and_a_down_on_the_same_prompt_make_one_pair(store):
    answer(store, "a", "good", adapter="v0002")
    answer(store, "b", "bad")
    up = rate(store, "a", "up")
    assert up.pair_id is None
    down = rate(store, "b", "down")
    [pair] = store.find_pairs([down.pair_id])
    assert (pair.chosen, pair.rejected, pair.origin) == ("good", "bad", "rating")
    assert (pair.chosen_version, pair.rejected_version) == ("v0002", "v0001")
    assert store.get(up.id).pair_id == down.pair_id
    answer(store, "c", "also bad")
    assert rate(store, "c", "down").pair_id is None  # the up is used


def test_ratings_of_one_batch_pair_up_too(store):
    answer(store, "a", "good")
    answer(store, "b", "bad")
    up, down = store.add([{"response_id": "a", "value": 1}, {"response_id": "b", "value": -1}])
    assert up.pair_id is None
    assert down.pair_id is not None


def test_the_newest_open_counterpart_is_taken(store):
    for name in ("a", "b", "c"):
        answer(store, name, f"text {name}")
    rate(store, "a", False)
    rate(store, "b", False)
    [pair] = store.find_pairs([rate(store, "c", True).pair_id])
    assert pair.rejected == "text b"


@pytest.mark.parametrize(
    ("second_prompt", "second_text", "users", "wait_s"),
    [
        ([{"role": "user", "content": "Else?"}], "bad", (None, None), 0),
        (USER, " good\n", (None, None), 0),
        (USER, "bad", ("ann", "bob"), 0),
        (USER, "bad", ("ann", None), 0),
        (USER, "bad", (None, None), 8 * 86_400),
        (USER, "", (None, None), 0),
    ],
    ids=["other prompt", "same text", "other user", "no user", "too late", "empty text"],
)
def test_ratings_that_do_not_belong_together_stay_alone(store, clock, second_prompt, second_text, users, wait_s):
    answer(store, "a", "good")
    answer(store, "b", second_text, second_prompt)
    rate(store, "a", "up", users[0])
    clock.now += wait_s
    assert rate(store, "b", "down", users[1]).pair_id is None
    assert store.counts().pairs["train"] == 0


def test_a_changed_mind_replaces_the_older_thumb(store):
    answer(store, "a", "one")
    answer(store, "b", "two")
    rate(store, "a", "up", "ann")
    rate(store, "a", "down", "ann")
    assert rate(store, "b", "down", "ann").pair_id is None
    assert rate(store, "b", "up", "ann").pair_id is not None


def test_deleting_a_rating_removes_its_pair_and_reopens_the_partner(store):
    for name in ("a", "b", "c"):
        answer(store, name, f"text {name}")
    up = rate(store, "a", "up")
    down = rate(store, "b", "down")
    assert store.delete(down.id)
    assert not store.delete(down.id)
    assert store.find_pairs([down.pair_id]) == []
    assert store.get(up.id).pair_id is None
    assert rate(store, "c", "down").pair_id is not None


def test_the_response_store_forgets_the_oldest_now_and_then(tmp_path):
    store = FeedbackStore.open(FeedbackConfig(max_responses=100), tmp_path)
    for number in range(400):
        answer(store, f"r{number}", "x")
        assert number < 100 or store.counts().responses <= 106 or number % 20
    assert store.counts().responses <= 106
    assert store.get_response("r399").text == "x"
    assert store.get_response("r300") is not None
    assert store.get_response("r0") is None


def test_responses_that_cannot_be_stored_are_skipped_and_the_first_of_an_id_stays(store):
    odd = [StoredResponse("x" * 201, 0, USER, "t"), StoredResponse("y", 0, USER, "\ud800")]
    assert store.put_responses([*odd, StoredResponse("z", 0, USER, "t")]) == 1
    assert store.put_responses([StoredResponse("z", 0, USER, "other"), StoredResponse("z", 1, USER, "n=2")]) == 1
    assert store.get_response("z").text == "t"
    assert store.get_response("z", 1).text == "n=2"


def test_pages_walk_every_item_once_even_while_new_ones_come(store):
    store.add([row(number, id=f"i{number}") for number in range(5)])
    seen, after = [], None
    while True:
        page = store.page(after=after, limit=2)
        seen += [entry.id for entry in page.entries]
        if after is None:
            store.add([{"type": "comment", "value": "new", "id": "late"}])
        if not page.has_more:
            break
        after = page.entries[-1].id
    assert seen == ["i0", "i1", "i2", "i3", "i4", "late"]
    assert [entry.item["value"] for entry in store.page(type="comment").entries] == ["new"]
    for wrong in ({"after": "nope"}, {"type": "nope"}):
        with pytest.raises(InvalidFeedbackError):
            store.page(**wrong)


def test_training_takes_the_least_trained_first_and_then_the_newest(store):
    ids = [outcome.pair_id for outcome in store.add([row(number) for number in range(4)])]

    def order(**options):
        return [ids.index(pair.pair_id) for pair in store.next_training_pairs(10, 3, **options)]

    assert order() == [3, 2, 1, 0]
    store.mark_trained([ids[3], ids[1]])
    assert order() == [2, 0, 3, 1]
    assert order(exclude={ids[2]}) == [0, 3, 1]
    assert [ids.index(pair.pair_id) for pair in store.next_training_pairs(1, 3, exclude={ids[2]})] == [0]
    store.park(ids[0], "hostile")
    assert order() == [2, 3, 1]
    store.mark_trained([ids[3]])
    store.mark_trained([ids[3]])
    assert order() == [2, 1]
    assert store.counts().pairs == {"train": 3, "heldout": 0, "parked": 1, "trained": 2}


def test_scores_and_failures_are_kept_and_success_forgives(store):
    first, second = (outcome.pair_id for outcome in store.add([row(1), row(2)]))
    assert [pair.pair_id for pair in store.unscored_pairs(5)] == [second, first]
    store.record_scores([score(first, 0.7, -0.1), score("unknown")], version="v0003")
    assert [pair.pair_id for pair in store.unscored_pairs(5)] == [second]
    [pair] = store.find_pairs([first])
    assert (pair.last_loss, pair.last_margin, pair.scored_version) == (0.7, -0.1, "v0003")
    assert store.mark_failed([first, second], "too long", max_attempts=2) == []
    store.mark_trained([second], [score(second, float("nan"))])
    assert store.mark_failed([first, second], "too long", max_attempts=2) == [first]
    parked, kept = store.find_pairs([first, second])
    assert (parked.state, parked.park_reason, kept.state, kept.attempts) == ("parked", "too long", "pending", 1)
    assert kept.last_loss is None
    assert store.unpark(first)
    assert not store.unpark(first)
    assert not store.park("unknown", "")


def test_the_backlog_is_what_was_never_trained(store, clock):
    assert (store.backlog().num_pairs, store.backlog().oldest_created_at) == (0, None)
    [old] = store.add([row(1)])
    clock.now = 2000.0
    store.add([row(2)])
    assert (store.backlog().num_pairs, store.backlog().oldest_created_at) == (2, 1000.0)
    store.mark_trained([old.pair_id])
    assert (store.backlog().num_pairs, store.backlog().oldest_created_at) == (1, 2000.0)


def test_a_prompt_stays_on_its_side_and_held_out_pairs_are_never_trained(tmp_path):
    config = FeedbackConfig(holdout_fraction=0.3)
    store = FeedbackStore.open(config, tmp_path)
    store.add([row(number) for number in range(60)])
    store.close()
    store = FeedbackStore.open(config, tmp_path)
    store.add([row(number, rejected="worse") for number in range(60)])
    held_out, trained = store.held_out_pairs(1000), store.next_training_pairs(1000, 1)
    assert len(held_out) + len(trained) == 120
    assert len(held_out) > 10
    assert not {pair.prompt for pair in held_out} & {pair.prompt for pair in trained}
    assert [pair.rejected for pair in store.held_out_pairs(3)] == ["worse"] * 3


@pytest.mark.parametrize("format", ["trl", "openai"])
def test_an_export_imports_as_the_same_pairs(tmp_path, format):
    import json

    store = FeedbackStore.open(ALL_TRAIN, tmp_path / "a")
    store.add([row(number, prompt=[*USER, {"role": "system", "content": str(number)}]) for number in range(3)])
    if format == "trl":
        store.add([row(7, chosen="ünï\u2028code")])
    lines = [json.dumps(one) for one in store.export(format)]
    copy = FeedbackStore.open(ALL_TRAIN, tmp_path / "b")
    report = import_jsonl(lines, copy.add, batch_items=2)
    assert (report.num_accepted, report.num_errors) == (len(lines), 0)
    assert [json.dumps(one) for one in copy.export(format)] == lines
    assert import_jsonl(lines, copy.add).num_duplicates == len(lines)
    with pytest.raises(InvalidFeedbackError):
        store.export("csv")


def test_hot_queries_use_an_index_and_sort_nothing(store):
    statements = []

    @event.listens_for(store._engine, "before_cursor_execute")
    def note(_connection, _cursor, statement, parameters, _context, _many):
        if statement.startswith("SELECT"):
            statements.append((statement, parameters))

    store.next_training_pairs(8, 4)
    store.held_out_pairs(8)
    store.unscored_pairs(8)
    store.backlog()
    store.page(type="comment")
    plain = sqlite3.connect(store._engine.url.database)
    assert len(statements) == 6
    for statement, parameters in statements:
        plan = " ".join(line[3] for line in plain.execute(f"EXPLAIN QUERY PLAN {statement}", parameters))
        assert "USING" in plan, statement
        assert "SCAN" not in plan, (plan, statement)
        assert "TEMP B-TREE" not in plan, (plan, statement)


@pytest.mark.parametrize("name", ["", "x" * 10_000, "\ud800", "\0", "'; drop table pairs; --"])
def test_names_that_nothing_can_have_are_unknown(store, name):
    assert store.get(name) is None
    assert store.get_response(name) is None
    assert store.find_pairs([name]) == []
    assert not store.delete(name)
    assert not store.park(name, "why")
    assert store.page(limit=10**30).entries == []
    with pytest.raises(InvalidFeedbackError, match="no feedback item"):
        store.page(after=name)


def test_urls_that_keep_nothing_or_cannot_work_are_configuration_errors(tmp_path):
    for url in ("sqlite://", "sqlite:///:memory:", "nonsense", "oracle+nodriver://h/db"):
        with pytest.raises(ConfigError, match="database_url"):
            FeedbackStore.open(FeedbackConfig(database_url=url), tmp_path)


def test_a_database_of_a_newer_release_is_not_touched(tmp_path):
    from alignment.schema import meta

    store = FeedbackStore.open(ALL_TRAIN, tmp_path)
    store._write(lambda c: c.execute(meta.delete()))
    store._write(lambda c: c.execute(insert(meta), {"key": "schema_version", "value": "2"}))
    with pytest.raises(ConfigError, match="schema 2"):
        FeedbackStore.open(ALL_TRAIN, tmp_path)
