"""How thumbs become pairs: examples, and random sequences against a small model of the rule."""

import itertools
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.records.pairs import StoredResponse
from alignment.store import ratings as ratings_module
from alignment.store.feedback_store import FeedbackStore
from core.alignment_config import FeedbackConfig

WINDOW = 5
PROMPTS, ANSWERS, USERS = ("p", "q"), ("a", "b", "c"), (None, "ann", "bob")
RATING = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(ANSWERS),
    st.sampled_from(USERS),
    st.sampled_from([1, -1]),
    st.sampled_from([0.0, 30.0, -7200.0, 1.75e9, -1.75e9]),
)
USER = [{"role": "user", "content": "Hi?"}]


def answer(store, response_id, text, prompt=USER, choice_index=0, adapter="v0001"):
    store.responses.put([StoredResponse(response_id, choice_index, prompt, text, adapter, "m")])


def rate(store, response_id, value, user=None, **extra):
    [outcome] = store.feedback.add([{"response_id": response_id, "value": value, "user": user, **extra}])
    assert outcome.status == "accepted", outcome
    return outcome


def test_an_up_and_a_down_on_the_same_prompt_make_one_pair(store):
    answer(store, "a", "good", adapter="v0002")
    answer(store, "b", "bad")
    up = rate(store, "a", "up")
    assert up.pair_id is None
    down = rate(store, "b", "down")
    [pair] = store.pairs.find([down.pair_id])
    assert (pair.chosen, pair.rejected, pair.origin) == ("good", "bad", "rating")
    assert (pair.chosen_version, pair.rejected_version) == ("v0002", "v0001")
    assert store.feedback.get(up.id).pair_id == down.pair_id
    answer(store, "c", "also bad")
    assert rate(store, "c", "down").pair_id is None  # the up is used


def test_ratings_of_one_batch_pair_up_too(store):
    answer(store, "a", "good")
    answer(store, "b", "bad")
    up, down = store.feedback.add([{"response_id": "a", "value": 1}, {"response_id": "b", "value": -1}])
    assert up.pair_id is None
    assert down.pair_id is not None


def test_the_newest_open_counterpart_is_taken(store):
    for name in ("a", "b", "c"):
        answer(store, name, f"text {name}")
    rate(store, "a", False)
    rate(store, "b", False)
    [pair] = store.pairs.find([rate(store, "c", True).pair_id])
    assert pair.rejected == "text b"


@pytest.mark.parametrize(
    ("second_prompt", "second_text", "users"),
    [
        ([{"role": "user", "content": "Else?"}], "bad", (None, None)),
        (USER, " good\n", (None, None)),
        (USER, "bad", ("ann", "bob")),
        (USER, "bad", ("ann", None)),
        (USER, "", (None, None)),
    ],
    ids=["other prompt", "same text", "other user", "no user", "empty text"],
)
def test_ratings_that_do_not_belong_together_stay_alone(store, second_prompt, second_text, users):
    answer(store, "a", "good")
    answer(store, "b", second_text, second_prompt)
    rate(store, "a", "up", users[0])
    assert rate(store, "b", "down", users[1]).pair_id is None
    assert store.counts().pairs["train"] == 0


def test_so_many_ratings_may_lie_between_the_two(store, monkeypatch):
    monkeypatch.setattr(ratings_module, "RATING_WINDOW", WINDOW)
    for number in range(2 * WINDOW):
        answer(store, f"r{number}", f"text {number}", f"prompt {number}")
    for last, is_pair in ((WINDOW, True), (WINDOW + 1, False)):
        first = f"first {last}"
        answer(store, f"{first} a", "good", first)
        answer(store, f"{first} b", "bad", first)
        rate(store, f"{first} a", "up")
        for number in range(last - 1):
            rate(store, f"r{number}", "up")
        assert (rate(store, f"{first} b", "down").pair_id is not None) is is_pair


JUMPS = {"from 1970 to 2025": 1_750_000_000.0, "back by an hour": -3600.0, "back to 1970": -1_750_000_000.0}


@pytest.mark.parametrize("jump_s", JUMPS.values(), ids=JUMPS)
def test_a_clock_that_jumps_parts_no_thumbs_and_turns_no_vote_round(store, clock, jump_s):
    clock.now_s = 86_400.0 if jump_s > 0 else 1_750_090_000.0
    answer(store, "a", "good")
    answer(store, "b", "bad")
    rate(store, "a", "down")  # a mistake, which is taken back on the other side of the jump
    clock.now_s += jump_s
    rate(store, "a", "up")
    [pair] = store.pairs.find([rate(store, "b", "down").pair_id])
    assert (pair.chosen, pair.rejected) == ("good", "bad")
    listed = [entry.item["response_id"] for entry in store.feedback.page().entries]
    assert listed == ["a", "a", "b"]
    first = store.feedback.page(limit=1)
    assert [entry.item["response_id"] for entry in store.feedback.page(after=first.entries[0].id).entries] == [
        "a",
        "b",
    ]


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
    assert store.feedback.delete(down.id)
    assert not store.feedback.delete(down.id)
    assert store.pairs.find([down.pair_id]) == []
    assert store.feedback.get(up.id).pair_id is None
    assert rate(store, "c", "down").pair_id is not None


def expected_pairs(ratings):
    """[(prompt, chosen, rejected)], in the order in which they come about."""
    pairs, open_ratings = [], []
    for number, (prompt, answer, user, value, _) in enumerate(ratings):
        open_ratings = [old for old in open_ratings if old[:3] != (prompt, answer, user)]
        partner = None
        for old in open_ratings:
            fits = old[0] == prompt and old[1] != answer and old[2] == user and old[3] == -value
            if fits and number - old[4] <= WINDOW:
                partner = old
        if partner is None:
            open_ratings.append((prompt, answer, user, value, number))
        else:
            open_ratings.remove(partner)
            chosen, rejected = (answer, partner[1]) if value == 1 else (partner[1], answer)
            pairs.append((prompt, chosen, rejected))
    return pairs


@settings(max_examples=25, deadline=None)
@given(st.lists(RATING, max_size=14), st.booleans())
def test_thumbs_pair_up_as_the_rule_says(ratings, as_one_batch):
    if as_one_batch:
        ratings = [(*rating[:4], 0.0) for rating in ratings]
    now = itertools.accumulate((rating[4] for rating in ratings), initial=0.0)
    window = mock.patch.object(ratings_module, "RATING_WINDOW", WINDOW)
    with tempfile.TemporaryDirectory() as state_dir, window:
        clock = {"now": 0.0}
        store = FeedbackStore.open(FeedbackConfig(), Path(state_dir), lambda: clock["now"])
        names = itertools.product(PROMPTS, ANSWERS)
        store.responses.put([StoredResponse(f"{prompt}-{text}", 0, prompt, text) for prompt, text in names])
        items = [{"response_id": f"{p}-{a}", "user": u, "value": v} for p, a, u, v, _ in ratings]
        if as_one_batch:
            store.feedback.add(items)
        else:
            next(now)
            for item, clock["now"] in zip(items, now, strict=True):
                store.feedback.add([item])
        rows = [(pair.prompt, pair.chosen, pair.rejected) for pair in store.pairs.after(0, 10_000)]
        store.close()
    assert rows == expected_pairs(ratings)
