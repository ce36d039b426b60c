"""Training order, splits, scores and failures of stored pairs."""

from typing import Any

from alignment.store import FeedbackStore
from core.config import FeedbackConfig
from core.types import PairScore

USER = [{"role": "user", "content": "Hi?"}]


def row(number: int, **extra: Any) -> dict[str, Any]:
    return {"prompt": f"p{number}", "chosen": "good", "rejected": "bad", **extra}


def score(pair_id: str, loss: float = 0.5, margin: float = 1.0) -> PairScore:
    return PairScore(pair_id, -1.0, -2.0, -1.0, -2.0, loss, margin)


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
    assert 2 * len(held_out) + len(trained) == 120  # each held-out prompt counts once, with its newest pair
    assert len(held_out) > 10
    assert not {pair.prompt for pair in held_out} & {pair.prompt for pair in trained}
    assert {pair.rejected for pair in held_out} == {"worse"}


def test_recent_training_pairs_are_the_newest_of_each_prompt(store):
    store.add([row(1), row(2), row(3)])
    store.add([row(2, rejected="changed my mind")])
    recent = store.recent_training_pairs(10)
    assert [(pair.prompt, pair.rejected) for pair in recent] == [
        (row(2)["prompt"], "changed my mind"),
        (row(3)["prompt"], row(3)["rejected"]),
        (row(1)["prompt"], row(1)["rejected"]),
    ]
    assert store.recent_training_pairs(1) == recent[:1]
