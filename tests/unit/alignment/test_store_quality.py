"""What the quality checks and the drift tracker look up and keep."""

import pytest

from alignment.drift.streams import DriftEvent
from alignment.records.pairs import contrary_key, pair_key
from alignment.store import feedback_store, pair_matches
from alignment.store.pair_matches import UserScore
from core.types import PairScore


def pair(chosen="good", rejected="bad", prompt="What?", **extra):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}


def test_equal_pairs_have_equal_keys_whatever_their_spaces_and_case():
    key = pair_key("What is  it?", "A cat", "A dog")
    assert key == pair_key("what IS it? ", "a  cat", "a dog\n")
    assert key != pair_key("What is it?", "A cat", "A dog!")
    assert contrary_key(key) == pair_key("What is it?", "A dog", "A cat") != key
    assert contrary_key(contrary_key(key)) == key
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert pair_key(chat, "a", "b") == pair_key([{"role": "user", "content": "hi "}], "a", "b")
    assert pair_key(chat, "a", "b") != pair_key([{"role": "system", "content": "Hi"}], "a", "b")


def test_answers_that_differ_in_case_alone_can_still_contradict_each_other():
    loud, quiet = pair_key("Say it", "HELLO", "hello"), pair_key("Say it", "hello", "HELLO")
    assert loud != quiet == contrary_key(loud)


def test_copies_and_contradictions_are_found_newest_first(store):
    items = [
        pair(user="ann"),
        pair("bad", "good", user="eve"),
        pair("GOOD ", "bad"),
        pair(prompt="Else?"),
        pair("other", "bad"),
    ]
    ids = [outcome.pair_id for outcome in store.feedback.add(items)]
    first = store.pairs.find(ids[:1])[0]
    found = store.matches.find([first.pair_key, "unknown-a"])
    assert found["unknown-a"] == []
    assert [(ids.index(one.pair_id), one.user, one.is_contrary) for one in found[first.pair_key]] == [
        (2, None, False),
        (1, "eve", True),
        (0, "ann", False),
    ]
    assert contrary_key(first.pair_key) == store.pairs.find([ids[1]])[0].pair_key
    assert len(store.matches.find([first.pair_key], limit=1)[first.pair_key]) == 2


def test_pairs_in_a_band_are_found_until_they_are_deleted_or_too_old(store, monkeypatch):
    outcomes = store.feedback.add([pair(prompt=str(number)) for number in range(4)])
    seqs = [one.seq for one in store.pairs.find([outcome.pair_id for outcome in outcomes])]
    rows = [("x", seqs[0]), ("x", seqs[1]), ("y", seqs[1]), ("x", seqs[2])]
    store.matches.put_bands(rows)
    store.matches.put_bands(rows)
    ids = [outcome.pair_id for outcome in outcomes]
    assert store.matches.band_matches(["x", "z", "y"], 2) == [("x", ids[2]), ("x", ids[1]), ("y", ids[1])]
    store.feedback.delete(outcomes[1].id)
    assert store.matches.band_matches(["x", "y"]) == [("x", ids[2]), ("x", ids[0])]
    monkeypatch.setattr(pair_matches, "MAX_BANDED_PAIRS", 2)
    store.database.write(pair_matches.trim_bands)
    store.matches.put_bands([("y", seqs[3])])
    assert store.matches.band_matches(["x", "y"]) == [("x", ids[2]), ("y", ids[3])]


def test_shares_and_scores_of_users(store):
    users = ["ann", "bob", None, "bob", "bob"]
    ids = [
        one.pair_id for one in store.feedback.add([pair(prompt=str(n), user=user) for n, user in enumerate(users)])
    ]
    assert store.matches.user_share(4) == {"bob": 3, "": 1}
    assert store.matches.user_share(100) == {"ann": 1, "bob": 3, "": 1}
    losses = (0.1, 0.2, 0.3, float("nan"))
    scores = [PairScore(pair_id, 0, 0, 0, 0, loss, -loss) for pair_id, loss in zip(ids, losses, strict=False)]
    store.pairs.record_scores(scores, "v0001")
    assert store.matches.user_scores("bob", 5) == [UserScore(ids[1], "bob", -0.2, "v0001")]
    assert store.matches.user_scores("eve", 5) == []


def test_drift_events_are_kept_newest_first_and_not_for_ever(store, monkeypatch):
    events = [DriftEvent(float(n), ("global", "user:ann")[n % 2], "loss", n / 10, f"why {n}") for n in range(6)]
    store.loop.put_drift_events(events[:4])
    store.loop.put_drift_events([DriftEvent(9.0, "global", "loss", float("nan"), "no number")])
    assert store.loop.drift_events(3) == [events[3], events[2], events[1]]
    assert store.loop.drift_events(9, "user:ann") == [events[3], events[1]]
    monkeypatch.setattr(feedback_store, "MAX_EVENTS", 3)
    store.loop.put_drift_events(events[4:])
    assert store.loop.drift_events(9) == [events[5], events[4], events[3]]


def test_states_are_kept_by_name_over_a_restart(open_store):
    store = open_store()
    assert store.loop.load_state("drift") is None
    store.loop.save_state("drift", {"level": 0.5, "words": ["ü", None]})
    store.loop.save_state("sampler", [1, 2])
    store.loop.save_state("drift", {"level": 0.25})
    store.close()
    store = open_store()
    assert (store.loop.load_state("drift"), store.loop.load_state("sampler")) == ({"level": 0.25}, [1, 2])
    with pytest.raises(ValueError, match="JSON"):
        store.loop.save_state("drift", {"level": float("nan")})
