"""The store: outcomes, identity, ratings, listing, training order and state."""

import json
from typing import Any

import pytest

from alignment.records.pairs import StoredResponse
from alignment.store import feedback_log
from alignment.store.feedback_store import FeedbackStore
from alignment.store.formats import export_chunk, import_jsonl
from core.alignment_config import FeedbackConfig
from core.errors import ConfigError, InvalidFeedbackError

ALL_TRAIN = FeedbackConfig(holdout_fraction=0.0)
USER = [{"role": "user", "content": "Hi?"}]


def row(number: int, **extra: Any) -> dict[str, Any]:
    return {"prompt": f"p{number}", "chosen": "good", "rejected": "bad", **extra}


def answer(store, response_id, text, prompt=USER, choice_index=0, adapter="v0001"):
    store.responses.put([StoredResponse(response_id, choice_index, prompt, text, adapter, "m")])


def exported(store, format):
    """All rows of the export, two at a time, as lines."""
    rows, position = export_chunk(store.pairs, format, 0, 2)
    while position is not None:
        more, position = export_chunk(store.pairs, format, position, 2)
        rows += more
    return [json.dumps(one) for one in rows]


def test_a_bad_item_does_not_stop_the_good_ones(store):
    good, bad, unknown, other = store.feedback.add(
        [row(1), {"prompt": 1}, {"chosen_id": "x", "rejected_id": "y"}, row(2)]
    )
    assert (good.status, other.status) == ("accepted", "accepted")
    assert good.id
    assert good.pair_id
    assert (bad.status, bad.error_type, bad.id) == ("error", "InvalidFeedbackError", None)
    assert (unknown.error_type, unknown.param) == ("UnknownResponseError", "chosen_id")
    assert store.counts().feedback == {"preference": 2}
    assert unknown.message.endswith("has the id 'x'")


def test_the_same_id_is_one_record_and_answers_like_the_first(store):
    [first] = store.feedback.add([row(1, id="mine")])
    [again] = store.feedback.add([row(1, id="mine")])
    assert first.id == again.id == "mine"
    assert (again.status, again.pair_id) == ("duplicate", first.pair_id)
    batch = store.feedback.add([row(2, id="x"), row(2, id="x"), row(2, id="x", created_at=5)])
    assert [one.status for one in batch] == ["accepted", "duplicate", "duplicate"]
    assert len({one.pair_id for one in batch}) == 1
    assert store.counts().pairs["train"] == 2


def test_the_same_id_with_other_content_is_an_error_not_a_silent_loss(store):
    store.feedback.add([row(1, id="mine")])
    [other] = store.feedback.add([row(2, id="mine")])
    assert (other.status, other.param) == ("error", "id")
    assert "other content" in other.message


def test_an_idempotency_key_covers_each_item_of_a_list(store):
    first = store.feedback.add([row(1), row(1), {"type": "comment", "value": "x"}], idempotency_key="k")
    again = store.feedback.add([row(1), row(1), {"type": "comment", "value": "x"}], idempotency_key="k")
    assert [one.status for one in first] == ["accepted"] * 3
    assert [one.status for one in again] == ["duplicate"] * 3
    assert [one.id for one in first] == [one.id for one in again]
    [changed] = store.feedback.add([row(9)], idempotency_key="k")
    assert (changed.status, changed.param) == ("error", "Idempotency-Key")
    for key in ("", "x" * 201, "a\nb"):
        with pytest.raises(InvalidFeedbackError):
            store.feedback.add([row(1)], idempotency_key=key)


def test_a_retry_is_a_duplicate_even_if_its_responses_are_gone(open_store, response_of):
    store = open_store(FeedbackConfig(max_responses=2))
    answer(store, "a", "good")
    answer(store, "b", "bad")
    item = {"id": "once", "chosen_id": "a", "rejected_id": "b"}
    [first] = store.feedback.add([item])
    for number in range(3):
        answer(store, f"later{number}", "x")
    assert response_of(store, "a") is None
    [again] = store.feedback.add([item])
    assert (again.status, again.pair_id) == ("duplicate", first.pair_id)


def test_too_many_items_are_refused_as_a_whole(store, monkeypatch):
    monkeypatch.setattr(feedback_log, "MAX_ITEMS", 2)
    with pytest.raises(InvalidFeedbackError, match="limit is 2"):
        store.feedback.add([row(1)] * 3)
    assert store.feedback.add([]) == []


def test_pairs_know_which_adapter_versions_answered(store):
    answer(store, "a", "good", adapter="v0002")
    answer(store, "b", "bad", adapter=None)
    [outcome] = store.feedback.add([{"chosen_id": "a", "rejected_id": "b", "weight": 2, "user": "u"}])
    [pair] = store.pairs.find([outcome.pair_id])
    assert (pair.chosen_version, pair.rejected_version) == ("v0002", None)
    assert (pair.prompt, pair.chosen, pair.rejected) == (USER, "good", "bad")
    assert (pair.weight, pair.user, pair.origin, pair.created_at) == (2.0, "u", "preference", 1000.0)


def test_a_correction_makes_a_pair_and_a_comment_none(store):
    answer(store, "a", "original")
    correction, comment, lost = store.feedback.add(
        [
            {"type": "correction", "response_id": "a", "value": "edit"},
            {"type": "comment", "response_id": "a", "value": "hm"},
            {"type": "comment", "response_id": "nope", "value": "hm"},
        ]
    )
    [pair] = store.pairs.find([correction.pair_id])
    assert (pair.chosen, pair.rejected, pair.origin) == ("edit", "original", "correction")
    assert (comment.status, comment.pair_id) == ("accepted", None)
    assert lost.error_type == "UnknownResponseError"


def test_the_response_store_forgets_the_oldest_now_and_then(open_store, response_of):
    store = open_store(FeedbackConfig(max_responses=40))
    for number in range(130):
        answer(store, f"r{number}", "x")
    assert store.counts().responses <= 43
    assert response_of(store, "r129").text == "x"
    assert response_of(store, "r95") is not None
    assert response_of(store, "r0") is None


def test_responses_that_cannot_be_stored_are_skipped_and_the_first_of_an_id_stays(store, response_of):
    odd = [StoredResponse("x" * 201, 0, USER, "t"), StoredResponse("y", 0, USER, "\ud800")]
    assert store.responses.put([*odd, StoredResponse("z", 0, USER, "t")]) == 1
    assert store.responses.put([StoredResponse("z", 0, USER, "other"), StoredResponse("z", 1, USER, "n=2")]) == 1
    assert "lone surrogate" in response_of(store, "y").unusable
    assert response_of(store, "z").text == "t"
    assert response_of(store, "z", 1).text == "n=2"


def test_pages_walk_every_item_once_even_while_new_ones_come(store):
    store.feedback.add([row(number, id=f"i{number}") for number in range(5)])
    seen, after = [], None
    while True:
        page = store.feedback.page(after=after, limit=2)
        seen += [entry.id for entry in page.entries]
        if after is None:
            store.feedback.add([{"type": "comment", "value": "new", "id": "late"}])
        if not page.has_more:
            break
        after = page.entries[-1].id
    assert seen == ["i0", "i1", "i2", "i3", "i4", "late"]
    assert [entry.item["value"] for entry in store.feedback.page(type="comment").entries] == ["new"]
    for wrong in ({"after": "nope"}, {"type": "nope"}):
        with pytest.raises(InvalidFeedbackError):
            store.feedback.page(**wrong)


@pytest.mark.parametrize("format", ["trl", "openai"])
def test_an_export_imports_as_the_same_pairs(open_store, format):
    store = open_store(ALL_TRAIN, "a")
    store.feedback.add(
        [row(number, prompt=[*USER, {"role": "system", "content": str(number)}]) for number in range(3)]
    )
    if format == "trl":
        store.feedback.add([row(7, chosen="ünï\u2028code")])
    lines = exported(store, format)
    copy = open_store(ALL_TRAIN, "b")
    report = import_jsonl(lines, copy.feedback.add, batch_items=2)
    assert (report.num_accepted, report.num_errors) == (len(lines), 0)
    assert exported(copy, format) == lines
    assert import_jsonl(lines, copy.feedback.add).num_duplicates == len(lines)
    with pytest.raises(InvalidFeedbackError):
        exported(store, "csv")


@pytest.mark.parametrize("name", ["", "x" * 10_000, "\ud800", "\0", "'; drop table pairs; --"])
def test_names_that_nothing_can_have_are_unknown(store, response_of, name):
    assert store.feedback.get(name) is None
    assert response_of(store, name) is None
    assert store.pairs.find([name]) == []
    assert not store.feedback.delete(name)
    assert not store.pairs.park(name, "why")
    assert store.feedback.page(limit=10**30).entries == []
    with pytest.raises(InvalidFeedbackError, match="no feedback item"):
        store.feedback.page(after=name)


def test_urls_that_keep_nothing_or_cannot_work_are_configuration_errors(tmp_path):
    for url in ("sqlite://", "sqlite:///:memory:", "nonsense", "oracle+nodriver://h/db"):
        with pytest.raises(ConfigError, match="database_url"):
            FeedbackStore.open(FeedbackConfig(database_url=url), tmp_path)
