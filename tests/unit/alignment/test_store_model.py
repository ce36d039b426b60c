"""Random histories: what the indexes answer is what a look at every pair would answer."""

import random

import pytest

from alignment.store.pairs import QualityChange
from core.alignment_config import FeedbackConfig
from core.types import PairScore

MAX_EPOCHS = 4
NUM_PAIRS = 90


def history(store, chooser):
    """Pairs with a random past; returns their ids."""
    items = [{"prompt": f"p{n % 60}", "chosen": f"a{n}", "rejected": "b"} for n in range(NUM_PAIRS)]
    ids = [outcome.pair_id for outcome in store.feedback.add(items)]
    for _ in range(40):
        some = chooser.sample(ids, 6)
        action = chooser.randrange(5)
        if action <= 1:
            scores = [PairScore(pair_id, -1, -2, -1, -2, chooser.uniform(0, 3), 0.0) for pair_id in some]
            store.pairs.record_scores(scores, chooser.choice(["v1", "v2", None]))
        elif action == 2:
            store.pairs.mark_trained(some)
        elif action == 3:
            store.pairs.set_quality(
                [QualityChange(pair_id, chooser.choice([0.0, 0.5, 1.0]), ("why",)) for pair_id in some]
            )
        else:
            store.pairs.park(some[0], "why")
    return ids


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_that_of_a_look_at_every_pair(open_store, seed):
    chooser = random.Random(seed)
    store = open_store(FeedbackConfig(holdout_fraction=0.3))
    ids = history(store, chooser)
    everything = store.pairs.find(ids)
    exclude = set(chooser.sample(ids, 9))
    pending = [pair for pair in everything if pair.state == "pending"][::-1]
    is_scored = {pair.pair_id for pair in pending if pair.last_loss is not None}
    free = [pair for pair in pending if pair.pair_id not in exclude]
    trainable = [p for p in free if p.split == "train" and p.pair_id in is_scored and p.quality > 0]
    new = [pair for pair in trainable if pair.times_trained == 0]
    old = [pair for pair in trainable if 0 < pair.times_trained < MAX_EPOCHS]
    hard = sorted((pair for pair in old if pair.last_loss >= 1.0), key=lambda pair: -pair.last_loss)
    assert new
    assert old

    assert store.sampling.new_pairs(7, exclude) == new[:7]
    assert store.sampling.new_pairs(7, exclude, "loss") == sorted(new, key=lambda pair: -pair.last_loss)[:7]
    assert store.sampling.hard_pairs(99, MAX_EPOCHS, exclude, 1.0) == hard
    assert store.sampling.hard_pairs(2, MAX_EPOCHS, exclude, 1.0) == hard[:2]
    middle = everything[len(everything) // 2].seq
    assert store.sampling.hard_pairs(99, MAX_EPOCHS, exclude, 1.0, middle) == [
        pair for pair in hard if pair.seq > middle
    ]
    assert sorted(store.sampling.replay_pairs(99, MAX_EPOCHS, exclude), key=lambda pair: -pair.seq) == old
    few = store.sampling.replay_pairs(3, MAX_EPOCHS, exclude, seed=seed)
    assert len({pair.pair_id for pair in few}) == min(3, len(old))
    assert {pair.pair_id for pair in few} <= {pair.pair_id for pair in old}
    assert store.sampling.unscored_pairs(99, exclude) == [pair for pair in free if pair.pair_id not in is_scored]
    scored = [pair for pair in pending if pair.pair_id in is_scored]
    assert store.sampling.newest_scored(20) == scored[:20]
    stale = [p for p in scored[:30] if p.scored_version != "v2" and p.pair_id not in exclude]
    assert store.sampling.stale_pairs(4, "v2", exclude, newest=30) == stale[:4]


@pytest.mark.parametrize("seed", range(3))
def test_the_gates_pairs_are_the_newest_of_their_prompts(open_store, seed):
    store = open_store(FeedbackConfig(holdout_fraction=0.5))
    ids = history(store, random.Random(seed))
    held = [
        p for p in store.pairs.find(ids)[::-1] if p.split == "heldout" and p.state == "pending" and p.quality > 0
    ]
    newest = {}
    for pair in held:
        newest.setdefault(pair.prompt, pair)
    recent, old = store.sampling.held_out(6, 5, since_seq=0, seed=seed)
    assert recent == list(newest.values())[:6]
    known = {pair.pair_id for pair in held}
    assert all(pair.pair_id in known and pair.prompt not in {one.prompt for one in recent} for pair in old)
    assert len({pair.prompt for pair in old}) == len(old) == 5
