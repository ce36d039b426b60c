"""Random sequences of thumbs against a ten-line model of the rule in alignment/rating_pairs.py."""

import itertools
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.pairs import StoredResponse
from alignment.store import FeedbackStore
from core.config import FeedbackConfig

WINDOW_S = 100.0
PROMPTS, ANSWERS, USERS = ("p", "q"), ("a", "b", "c"), (None, "ann", "bob")
RATING = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(ANSWERS),
    st.sampled_from(USERS),
    st.sampled_from([1, -1]),
    st.sampled_from([0.0, 30.0, 90.0]),
)


def expected_pairs(ratings):
    """[(prompt, chosen, rejected)], in the order in which they come about."""
    pairs, open_ratings, now = [], [], 0.0
    for prompt, answer, user, value, wait_s in ratings:
        now += wait_s
        open_ratings = [old for old in open_ratings if old[:3] != (prompt, answer, user)]
        partner = None
        for old in open_ratings:
            fits = old[0] == prompt and old[1] != answer and old[2] == user and old[3] == -value
            if fits and old[4] >= now - WINDOW_S:
                partner = old
        if partner is None:
            open_ratings.append((prompt, answer, user, value, now))
        else:
            open_ratings.remove(partner)
            chosen, rejected = (answer, partner[1]) if value == 1 else (partner[1], answer)
            pairs.append((prompt, chosen, rejected))
    return pairs


@settings(max_examples=40, deadline=None)
@given(st.lists(RATING, max_size=14), st.booleans())
def test_thumbs_pair_up_as_the_rule_says(ratings, as_one_batch):
    if as_one_batch:
        ratings = [(*rating[:4], 0.0) for rating in ratings]
    now = itertools.accumulate((rating[4] for rating in ratings), initial=0.0)
    with tempfile.TemporaryDirectory() as state_dir:
        clock = {"now": 0.0}
        config = FeedbackConfig(rating_window_s=WINDOW_S)
        store = FeedbackStore.open(config, Path(state_dir), lambda: clock["now"])
        names = itertools.product(PROMPTS, ANSWERS)
        store.put_responses([StoredResponse(f"{prompt}-{text}", 0, prompt, text) for prompt, text in names])
        items = [{"response_id": f"{p}-{a}", "user": u, "value": v} for p, a, u, v, _ in ratings]
        if as_one_batch:
            store.add(items)
        else:
            next(now)
            for item, clock["now"] in zip(items, now, strict=True):
                store.add([item])
        rows = [(row["prompt"], row["chosen"], row["rejected"]) for row in store.export("trl")]
        store.close()
    assert rows == expected_pairs(ratings)
