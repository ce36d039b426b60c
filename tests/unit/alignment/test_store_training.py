"""Splits, scores, failures, and what is drawn for training, scoring and testing."""

from typing import Any

import pytest

from alignment.store.pairs import QualityChange
from core.alignment_config import FeedbackConfig
from core.types import PairScore
from core.wire import CachedReference


def row(number: int, **extra: Any) -> dict[str, Any]:
    return {"prompt": f"p{number}", "chosen": "good", "rejected": "bad", **extra}


def score(pair_id: str, loss: float = 0.5, margin: float = 1.0) -> PairScore:
    return PairScore(pair_id, -1.0, -2.0, -3.0, -4.0, loss, margin)


def quality(pair_id: str, value: float, *reasons: str) -> QualityChange:
    return QualityChange(pair_id, value, reasons)


def add(store, count: int, **extra: Any) -> list[str]:
    return [outcome.pair_id for outcome in store.feedback.add([row(number, **extra) for number in range(count)])]


@pytest.fixture
def scored(store):
    """Six scored pairs with losses 0, 1, ... 5, in order of arrival."""
    ids = add(store, 6)
    store.pairs.record_scores([score(pair_id, float(number)) for number, pair_id in enumerate(ids)])
    return ids


def positions(ids, pairs):
    return [ids.index(pair.pair_id) for pair in pairs]


def test_new_pairs_are_scored_and_never_trained_newest_or_worst_first(store, scored):
    unscored = add(store, 1)
    store.pairs.record_scores([score(scored[2], 9.0)])
    assert positions(scored, store.sampling.new_pairs(10)) == [5, 4, 3, 2, 1, 0]
    assert positions(scored, store.sampling.new_pairs(2, order="loss")) == [2, 5]
    store.pairs.mark_trained([scored[5], scored[4]])
    assert positions(scored, store.sampling.new_pairs(2, {scored[3]})) == [2, 1]
    store.pairs.set_quality([quality(scored[2], 0.0, "hostile"), quality(scored[1], 0.5, "copy", "flood")])
    store.pairs.park(scored[0], "broken")
    assert positions(scored, store.sampling.new_pairs(10, order="loss")) == [3, 1]
    [pair] = store.pairs.find([scored[1]])
    assert (pair.quality, pair.quality_reasons) == (0.5, ("copy", "flood"))
    assert positions(scored, store.sampling.new_pairs(10)) == [3, 1]
    behind = store.pairs.find([scored[1]])[0].seq
    assert positions(scored, store.sampling.new_pairs(10, since_seq=behind)) == [3]
    assert [pair.pair_id for pair in store.sampling.unscored_pairs(5)] == unscored


def test_hard_pairs_were_trained_before_and_are_still_wrong_worst_first(store, scored):
    assert store.sampling.hard_pairs(10, 3) == []
    store.pairs.mark_trained(scored[1:])
    store.pairs.mark_trained(scored[3:])
    assert positions(scored, store.sampling.hard_pairs(10, 3)) == [5, 4, 3, 2, 1]
    assert positions(scored, store.sampling.hard_pairs(10, 2)) == [2, 1]
    assert positions(scored, store.sampling.hard_pairs(2, 3, {scored[5]}, min_loss=4.0)) == [4]
    behind = store.pairs.find([scored[2]])[0].seq
    assert positions(scored, store.sampling.hard_pairs(10, 3, since_seq=behind)) == [5, 4, 3]
    assert positions(scored, store.sampling.hard_pairs(1, 3, {scored[5]}, since_seq=behind)) == [4]
    store.pairs.record_scores([score(scored[4], float("nan"))])
    assert positions(scored, store.sampling.hard_pairs(2, 3)) == [5, 3]
    assert positions(scored, store.sampling.hard_pairs(2, 3, since_seq=behind)) == [5, 3]


def test_a_replay_sample_is_drawn_evenly_from_what_was_trained(store):
    ids = add(store, 200)
    store.pairs.record_scores([score(pair_id) for pair_id in ids])
    store.pairs.mark_trained(ids[::2])
    store.pairs.mark_trained(ids[::4])
    draws = [positions(ids, store.sampling.replay_pairs(8, 3, seed=seed)) for seed in range(60)]
    assert draws[0] == positions(ids, store.sampling.replay_pairs(8, 3, seed=0))
    assert all(len(set(draw)) == 8 for draw in draws)
    drawn = [number for draw in draws for number in draw]
    assert all(number % 2 == 0 for number in drawn)
    thirds = [sum(low <= number < low + 67 for number in drawn) / len(drawn) for low in (0, 67, 134)]
    assert all(0.2 < share < 0.47 for share in thirds)
    assert all(number % 4 for number in positions(ids, store.sampling.replay_pairs(200, 2)))
    first_half = {pair.pair_id for pair in store.pairs.find(ids[:100])}
    since = store.pairs.find([ids[99]])[0].seq
    late = store.sampling.replay_pairs(100, 3, exclude={ids[198]}, since_seq=since)
    assert len(late) == 49
    assert not {pair.pair_id for pair in late} & {*first_half, ids[198]}


def test_the_gates_pairs_are_the_newest_of_each_prompt_and_a_sample_of_older_ones(open_store):
    store = open_store(FeedbackConfig(holdout_fraction=0.5))
    first = add(store, 120)
    second = [
        outcome.pair_id for outcome in store.feedback.add([row(number, chosen="better") for number in range(20)])
    ]
    everything = {pair.pair_id: pair for pair in store.pairs.find([*first, *second])}
    held = [pair for pair in everything.values() if pair.split == "heldout"]
    distrusted = held[-1].pair_id
    store.pairs.set_quality([quality(distrusted, 0.0, "hostile")])
    recent, old = store.sampling.held_out(5, 10, seed=3)
    assert [pair.seq for pair in recent] == sorted((pair.seq for pair in held[:-1]), reverse=True)[:5]
    assert len(old) == 10
    assert len({pair.prompt for pair in (*recent, *old)}) == 15
    assert max(pair.seq for pair in old) < min(pair.seq for pair in recent)
    assert {pair.split for pair in old} == {"heldout"}
    assert store.sampling.held_out(5, 10, seed=3)[1] == old
    assert store.sampling.held_out(5, 10, seed=4)[1] != old
    since = held[30].seq
    assert all(pair.seq > since for pair in store.sampling.held_out(5, 10, since_seq=since)[1])
    assert store.sampling.held_out(0, 0) == ([], [])
    assert len(store.sampling.held_out(0, 5)[1]) == 5
    assert store.sampling.held_out(1000, 1000)[1] == []  # nothing is older than everything


def test_a_prompt_stays_on_its_side_and_held_out_pairs_are_never_trained(open_store):
    config = FeedbackConfig(holdout_fraction=0.3)
    store = open_store(config)
    add(store, 60)
    store.close()
    store = open_store(config)
    ids = add(store, 60, rejected="worse")
    store.pairs.record_scores([score(pair_id) for pair_id in ids])
    held_out, trained = store.sampling.held_out(1000, 0)[0], store.sampling.new_pairs(1000)
    assert len(held_out) + len(trained) == 60  # each held-out prompt counts once, with its newest pair
    assert len(held_out) > 10
    assert not {pair.prompt for pair in held_out} & {pair.prompt for pair in trained}
    assert {pair.rejected for pair in held_out} == {"worse"}


def test_scores_and_failures_are_kept(store, clock):
    first, second = add(store, 2)
    assert [pair.pair_id for pair in store.sampling.unscored_pairs(5)] == [second, first]
    store.pairs.record_scores([score(first, 0.7, -0.1), score("unknown")], version="v0003")
    assert [pair.pair_id for pair in store.sampling.unscored_pairs(5)] == [second]
    assert store.sampling.unscored_pairs(5, exclude={second}) == []
    [pair] = store.pairs.find([first])
    assert (pair.last_loss, pair.last_margin, pair.scored_version, pair.scored_at) == (0.7, -0.1, "v0003", 1000.0)
    store.pairs.mark_trained([second], [score(second, float("nan"))])
    assert store.pairs.park(first, "too long")
    assert not store.pairs.park(first, "again")
    parked, kept = store.pairs.find([first, second])
    assert (parked.state, parked.park_reason, kept.state) == ("parked", "too long", "pending")
    assert kept.last_loss is None
    assert not store.pairs.park("unknown", "")


def test_reference_scores_are_kept_with_their_key_until_another_key_comes(store):
    first, second, third = add(store, 3)
    odd = PairScore(third, -1.0, -2.0, float("-inf"), -4.0, 0.5, 1.0)
    store.pairs.record_scores([score(first), score(second), odd], "v0001", {first: "key", third: "key"})
    pairs = store.pairs.find([first, second, third])
    assert [pair.reference for pair in pairs] == [CachedReference("key", -3.0, -4.0), None, None]
    assert {pair.last_loss for pair in pairs} == {0.5}
    store.pairs.record_scores([score(first, 0.1)], "v0002")
    [pair] = store.pairs.find([first])
    assert (pair.reference, pair.last_loss) == (CachedReference("key", -3.0, -4.0), 0.1)
    store.pairs.record_scores([score(first)], "v0002", {first: "other"})
    assert store.pairs.find([first])[0].reference == CachedReference("other", -3.0, -4.0)


def test_training_keeps_the_live_adapters_scores_unless_it_brings_its_own(store):
    first, second = add(store, 2)
    store.pairs.record_scores([score(first, 0.7), score(second, 0.7)], "v0001")
    store.pairs.mark_trained([first, second])
    store.pairs.mark_trained([second], [score(second, 0.2)], "v0001+")
    kept, replaced = store.pairs.find([first, second])
    assert (kept.times_trained, kept.last_loss, kept.scored_version) == (1, 0.7, "v0001")
    assert (replaced.times_trained, replaced.last_loss, replaced.scored_version) == (2, 0.2, "v0001+")


def test_after_a_publication_the_newest_pairs_are_stale(store, scored):
    store.pairs.record_scores([score(pair_id) for pair_id in scored[3:]], "v0001")
    assert positions(scored, store.sampling.stale_pairs(10, "v0001")) == [2, 1, 0]
    assert positions(scored, store.sampling.stale_pairs(10, None)) == [5, 4, 3]
    assert positions(scored, store.sampling.stale_pairs(2, "v0002", {scored[5]}, newest=3)) == [4, 3]
    assert store.sampling.stale_pairs(2, "v0001", newest=3) == []
    assert positions(scored, store.sampling.newest_scored(3)) == [5, 4, 3]


def test_trained_pairs_are_counted(store):
    [old] = add(store, 1)
    store.feedback.add([row(2)])
    store.pairs.record_scores([score(old)])
    store.pairs.mark_trained([old])
    assert store.counts().pairs == {"train": 2, "heldout": 0, "parked": 0, "left_out": 0, "trained": 1}


def test_tags_and_user_stay_with_the_pair(store):
    [tagged] = add(store, 1, user="ann", tags={"team": "blue", "lang": "de"})
    [plain] = add(store, 1)
    with_tags, without = store.pairs.find([tagged, plain])
    assert (with_tags.user, with_tags.tags) == ("ann", {"team": "blue", "lang": "de"})
    assert (without.user, without.tags) == (None, {})
    assert without.seq > with_tags.seq
