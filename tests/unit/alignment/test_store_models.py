"""What training knew of a pair is knowledge of one base model; and pairs that a rebuild leaves out."""

import pytest

from alignment.store.schema import pair_pasts
from core.errors import ConflictError
from tests.unit.alignment.test_store_training import add, score

ONE, OTHER = "1-2-3-4", "0-2-3-4"


def counts(store):
    return [pair.times_trained for pair in store.pairs.after(0, 100)]


def num_pasts(store):
    return store.database.read(lambda connection: len(connection.execute(pair_pasts.select()).all()))


def learn(store, ids, version="v0001"):
    store.pairs.record_scores([score(pair_id, 0.1) for pair_id in ids], version)
    store.pairs.mark_trained(ids)


def test_another_model_sees_every_pair_as_new_and_the_first_one_goes_on_from_where_it_was(store):
    ids = add(store, 4)
    assert not store.models.begin(ONE)  # whatever was known before is taken for its own
    learn(store, ids[:3])
    store.pairs.park(ids[3], "too long for this model")
    store.loop.save_state("judge", {"level": 0.5})
    before = store.pairs.find(ids)
    assert store.models.begin(OTHER)
    assert not store.models.begin(OTHER)
    assert store.models.served() == OTHER
    assert counts(store) == [0] * 4
    assert [pair.pair_id for pair in store.sampling.unscored_pairs(9)] == ids[::-1]  # the parked one too
    assert store.sampling.newest_scored(9) == store.sampling.replay_pairs(9, 10) == []
    assert store.loop.load_state("judge") is None
    learn(store, ids[2:], "v0002")
    store.loop.save_state("judge", {"level": 0.25})
    assert store.models.begin(ONE)
    assert store.pairs.find(ids) == before
    assert store.loop.load_state("judge") == {"level": 0.5}
    assert store.models.begin(OTHER)
    assert counts(store) == [0, 0, 1, 1]
    assert [pair.scored_version for pair in store.pairs.find(ids)] == [None, None, "v0002", "v0002"]
    assert store.loop.load_state("judge") == {"level": 0.25}


def test_pairs_that_came_meanwhile_are_new_for_both(store):
    ids = add(store, 1)
    store.models.begin(ONE)
    learn(store, ids)
    store.models.begin(OTHER)
    [later] = store.feedback.add([{"prompt": "later", "chosen": "a", "rejected": "b"}])
    store.models.begin(ONE)
    assert [pair.pair_id for pair in store.sampling.unscored_pairs(9)] == [later.pair_id]
    assert counts(store) == [1, 0]


def test_what_is_forgotten_is_forgotten_with_every_model(store):
    [outcome] = store.feedback.add([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    store.models.begin(ONE)
    learn(store, [outcome.pair_id])
    store.models.begin(OTHER)
    assert num_pasts(store) == 1
    store.feedback.delete(outcome.id)
    assert num_pasts(store) == 0
    store.models.begin(ONE)
    assert counts(store) == []


def test_a_rebuild_leaves_users_out_until_one_that_does_not_name_them(store):
    of_ann, of_bob, of_nobody = add(store, 2, user="ann"), add(store, 1, user="bob"), add(store, 1)
    everything = [*of_ann, *of_bob, *of_nobody]
    store.pairs.record_scores([score(pair_id) for pair_id in everything])

    def relearnt():
        return [pair.pair_id for pair in store.pairs.to_relearn(0, 100, 100)]

    for nobody in ("anne", "", "a\0", "\ud800"):
        with pytest.raises(ConflictError, match="no stored pair is by the user"):
            store.pairs.leave_out(["ann", nobody])
    assert relearnt() == everything
    number, newest = store.pairs.leave_out(["ann"])
    assert (number, newest) == (2, 4)
    assert relearnt() == [pair.pair_id for pair in store.pairs.after(0, 9) if pair.user != "ann"]
    assert store.counts().pairs == {"train": 2, "heldout": 0, "parked": 0, "left_out": 2, "trained": 0}
    assert not store.pairs.park(of_ann[0], "failed")  # and so it stays
    assert store.models.begin(ONE) or store.models.begin(OTHER)
    assert {pair.state for pair in store.pairs.find(of_ann)} == {"left_out"}
    store.models.begin(ONE)
    assert {pair.state for pair in store.pairs.find(of_ann)} == {"left_out"}
    assert store.pairs.leave_out(["bob"])[0] == 3
    assert relearnt() == [*of_ann, *of_nobody]
    assert store.pairs.leave_out([])[0] == 4
    assert relearnt() == everything
    [later] = store.feedback.add([{"prompt": "later", "chosen": "a", "rejected": "b", "user": "ann"}])
    assert store.pairs.find([later.pair_id])[0].state == "pending"


def test_what_a_rebuild_learnt_counts_as_trained_once(store):
    ids = add(store, 4)
    learn(store, ids[:3])
    learn(store, ids[:1])
    store.pairs.record_scores([score(ids[3])])
    store.pairs.mark_relearnt(3)
    assert counts(store) == [1, 1, 1, 0]
    assert [pair.pair_id for pair in store.pairs.to_relearn(1, 3, 1)] == [ids[1]]
