"""The quality checks on a real store: every finding, its reason on the record, and what it does to other pairs."""

import math
from itertools import count

import pytest

from alignment.quality import monitor as quality_monitor
from alignment.quality.monitor import MAX_COPIES, QualityMonitor
from core.alignment_config import QualityConfig
from core.types import PairScore

LIVE = "v0001"
_numbers = count()
WORDS = ["amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "larch"]


@pytest.fixture
def monitor(store):
    return QualityMonitor(QualityConfig(), store)


def item(user, **fields):
    """A preference like no other."""
    number = next(_numbers)
    words = " ".join(WORDS[number // 12**place % 12] for place in range(4))
    texts = {"prompt": f"tell of {words}", "chosen": f"yes {words} it is", "rejected": f"no {words} it never was"}
    return texts | fields | ({"user": user} if user else {})


def add(store, *items):
    return [outcome.pair_id for outcome in store.feedback.add(list(items))]


def assess(store, monitor, ids, margin=2.0, version=LIVE):
    """Score pairs as the live adapter would (one margin for all, or one for each pair) and judge them."""
    margins = margin if isinstance(margin, list) else [margin] * len(ids)
    scores = [
        PairScore(pair_id, 0.0, 0.0, 0.0, 0.0, math.log1p(math.exp(-value)), value)
        for pair_id, value in zip(ids, margins, strict=True)
    ]
    store.pairs.record_scores(scores, version)
    return {change.pair_id: change for change in monitor.assess(store.pairs.find(ids))}


def say(store, monitor, user, number, margin=2.0, version=LIVE):
    return say_together(
        store, monitor, {user: margin if isinstance(margin, list) else [margin] * number}, version
    )[user]


def say_together(store, monitor, margins_of, version=LIVE):
    """Pairs of several users, judged in one call; their ids by user."""
    users = [user for user, margins in margins_of.items() for _ in margins]
    ids = add(store, *map(item, users))
    assess(store, monitor, ids, [margin for margins in margins_of.values() for margin in margins], version)
    return {user: [one for one, owner in zip(ids, users, strict=True) if owner == user] for user in margins_of}


def qualities(store, ids):
    by_id = {pair.pair_id: pair.quality for pair in store.pairs.find(ids)}
    return [by_id[pair_id] for pair_id in ids]


def reasons(store, pair_id):
    return " | ".join(store.pairs.find([pair_id])[0].quality_reasons)


def test_ordinary_feedback_is_left_alone(store, monitor):
    said = crowd(store, monitor, hostile=(), users=("ann", "bob", "cem", "dua", None), rounds=5)
    assert all(set(qualities(store, ids)) == {1.0} for ids in said.values())
    assert monitor.user_report() == {"judged": 5, "distrusted": [], "spared": []}


def test_switched_off_it_changes_nothing(store):
    monitor = QualityMonitor(QualityConfig(enabled=False), store)
    one = item("eve")
    ids = add(store, one, one, one)
    assert assess(store, monitor, ids) == {}
    assert qualities(store, ids) == [1.0, 1.0, 1.0]


def long_text(changed_word=None):
    words = [f"word{number}" for number in range(200)]
    if changed_word is not None:
        words[changed_word] = "other"
    return " ".join(words)


def test_the_nth_copy_by_one_user_counts_one_nth(store, monitor):
    ids = add(store, *(item("eve", prompt="why is it so", chosen=long_text(), rejected="no") for _ in range(3)))
    assess(store, monitor, ids)
    assert qualities(store, ids) == [1.0, 0.5, 0.33]
    assert "near duplicate: copy 3 of pair-" in reasons(store, ids[2])
    assert "similarity 1.00" in reasons(store, ids[2])


def test_copies_are_found_across_calls_and_after_a_small_change(store, monitor):
    first = add(store, item("eve", prompt="why", chosen=long_text(), rejected="No!"))
    assess(store, monitor, first)
    second = add(store, item("eve", prompt="Why?", chosen=long_text(changed_word=100), rejected="no"))
    assess(store, QualityMonitor(QualityConfig(), store), second)  # after a restart, too
    assert qualities(store, first + second) == [1.0, 0.5]


def test_a_shared_system_prompt_makes_no_copies(store, monitor):
    items = [item("ann") for _ in range(4)]
    for one in items:
        one["prompt"] = [
            {"role": "system", "content": long_text()},
            {"role": "user", "content": one["prompt"]},
        ]
    ids = add(store, *items)
    assert assess(store, monitor, ids) == {}


def test_a_copy_that_is_scored_again_keeps_its_number(store, monitor):
    ids = add(store, *(item("eve", prompt="why", chosen="because", rejected="no") for _ in range(3)))
    assess(store, monitor, ids)
    assess(store, monitor, ids, version="v0002")
    assert qualities(store, ids) == [1.0, 0.5, 0.33]


def test_other_users_who_say_the_same_are_evidence(store, monitor):
    said = [item(user, prompt="why", chosen="because", rejected="no") for user in ("ann", "bob", "cem")]
    assert assess(store, monitor, add(store, *said)) == {}


def test_many_copies_count_as_a_few(store, monitor):
    ids = []
    for _ in range(4):
        batch = add(store, *(item("eve", prompt="why", chosen="because", rejected="no") for _ in range(25)))
        assess(store, monitor, batch)
        ids += batch
    weights = qualities(store, ids)
    assert sum(weights) < 5
    assert set(weights[MAX_COPIES + 1 :]) == {0.0}


def opposite(users_for, users_against):
    pro = [item(user, prompt="tea?", chosen="yes", rejected="no") for user in users_for]
    contra = [item(user, prompt="Tea? ", chosen="no", rejected="yes") for user in users_against]
    return pro, contra


def test_one_against_one_leaves_nothing_of_either(store, monitor):
    pro, contra = opposite(["ann"], ["bob"])
    first = add(store, *pro)
    assert assess(store, monitor, first) == {}
    second = add(store, *contra)
    changes = assess(store, monitor, second)
    assert set(changes) == {*first, *second}
    assert qualities(store, first + second) == [0.0, 0.0]
    assert "contradiction: 1 of 2 users prefer the opposite: x 0" in reasons(store, first[0])


def test_a_majority_keeps_its_surplus(store, monitor):
    pro, contra = opposite(["ann", "bob", "cem"], ["eve"])
    ids = add(store, *pro, *contra)
    assess(store, monitor, ids)
    assert qualities(store, ids) == [0.67, 0.67, 0.67, 0.0]


def test_a_vote_that_is_repeated_is_one_vote(store, monitor):
    pro, contra = opposite(["ann", "bob"], ["eve"] * 10)
    ids = add(store, *pro, *contra)
    assess(store, monitor, ids)
    assert qualities(store, ids) == [0.5, 0.5] + [0.0] * 10


def test_who_changes_their_mind_supersedes_themselves(store, monitor):
    pro, contra = opposite(["ann"], ["ann"])
    old, new = add(store, *pro, *contra)
    assess(store, monitor, [old, new])
    assert qualities(store, [old, new]) == [0.0, 1.0]
    assert f"superseded: the same user preferred the opposite later, in {new}: x 0" == reasons(store, old)


def test_anonymous_users_do_not_change_their_mind(store, monitor):
    pro, contra = opposite([None], [None])
    ids = add(store, *pro, *contra)
    assess(store, monitor, ids)
    assert qualities(store, ids) == [0.0, 0.0]


def test_a_contradiction_that_was_deleted_counts_no_more(store, monitor):
    pro, contra = opposite(["ann"], ["bob"])
    first, second = add(store, *pro, *contra)
    assess(store, monitor, [first, second])
    assert store.feedback.delete(store.feedback.page().entries[-1].id)
    assess(store, monitor, [first], version="v0002")
    assert qualities(store, [first]) == [1.0]


def test_a_flood_is_held_at_its_share(store, monitor):
    crowd(store, monitor, hostile=(), users=USERS[:3], rounds=4)
    flood = add(store, *(item("eve") for _ in range(70)))
    assess(store, monitor, flood)
    weight = qualities(store, flood)[0]
    assert weight * 70 / (weight * 70 + 36) == pytest.approx(0.3, abs=0.01)
    assert "flooding: user 'eve' sent 66% of the newest 106 pairs, at most 30% count" in reasons(store, flood[0])


def test_a_flood_that_fills_the_whole_window_is_still_seen(store, monitor, monkeypatch):
    monkeypatch.setattr(quality_monitor, "FLOOD_WINDOW", 40)
    crowd(store, monitor, hostile=(), users=USERS[:3], rounds=4)
    flood = say(store, monitor, "eve", 60)
    assert max(qualities(store, flood)) < 0.05


def test_leaving_out_the_name_is_no_way_around(store, monitor):
    crowd(store, monitor, hostile=(), users=USERS[:3], rounds=4)
    assert max(qualities(store, say(store, monitor, None, 70))) < 0.25


@pytest.mark.parametrize("users", [[None], ["ann"], ["ann", "bob"]])
def test_without_two_others_nobody_floods(store, monitor, users):
    assert set(qualities(store, say(store, monitor, users[0], 60))) == {1.0}
    for user in users:
        assert set(qualities(store, say(store, monitor, user, 5))) == {1.0}


def test_three_equal_users_flood_nobody(store, monitor):
    said = crowd(store, monitor, hostile=(), users=("ann", "bob", "cem"), rounds=10)
    assert all(set(qualities(store, ids)) == {1.0} for ids in said.values())


def test_a_loss_that_stands_out_counts_half(store, monitor):
    say(store, monitor, "ann", 15)
    say(store, monitor, "bob", 15)
    (odd,) = say(store, monitor, "ann", 1, margin=-5.0)
    assert qualities(store, [odd]) == [0.5]
    assert "outlier: loss 5.01, z = " in reasons(store, odd)
    assert "scores of v0001: x 0.5" in reasons(store, odd)


def test_a_hard_pair_is_no_outlier(store, monitor):
    say(store, monitor, "ann", 30)
    hard = say(store, monitor, "ann", 1, margin=-0.2)
    assert qualities(store, hard) == [1.0]


def test_under_a_new_version_an_outlier_may_be_none(store, monitor):
    say(store, monitor, "ann", 30)
    (odd,) = say(store, monitor, "ann", 1, margin=-5.0)
    assess(store, monitor, [odd], margin=1.0, version="v0002")
    assert qualities(store, [odd]) == [1.0]


def test_drift_is_no_outlier_and_clears_those_it_began_with(store, monitor):
    say(store, monitor, "ann", 40)
    first = say(store, monitor, "ann", 4, margin=-5.0)
    assert qualities(store, first) == [0.5] * 4
    more = say(store, monitor, "ann", 12, margin=-5.0)
    assert qualities(store, first + more) == [1.0] * 16


USERS = ("ann", "bob", "cem", "dua", "eve")


def crowd(store, monitor, hostile=("eve",), rounds=4, users=USERS, version=LIVE):
    """Rounds of three pairs from each user; the live adapter gets those of `hostile` users wrong."""
    said = {user: [] for user in users}
    for _ in range(rounds):
        margins = {user: [-2.0 if user in hostile else 2.0] * 3 for user in users}
        for user, ids in say_together(store, monitor, margins, version).items():
            said[user] += ids
    return said


def test_a_hostile_user_is_distrusted_and_earlier_pairs_are_lowered(store, monitor):
    said = crowd(store, monitor)
    assert set(qualities(store, said["eve"])) == {0.0}
    assert all(set(qualities(store, said[user])) == {1.0} for user in ("ann", "bob", "cem", "dua"))
    assert "trust: user 'eve' agrees with the live adapter in 0% of" in reasons(store, said["eve"][0])
    (entry,) = monitor.user_report()["distrusted"]
    assert (entry["user"], entry["weight"]) == ("eve", 0.0)


def test_a_restart_distrusts_the_same_users(store, monitor):
    said = crowd(store, monitor)
    restarted = QualityMonitor(QualityConfig(), store)
    new = say(store, restarted, "eve", 1, margin=-2.0)
    assert qualities(store, new) == [0.0]
    assert [one["user"] for one in restarted.user_report()["distrusted"]] == ["eve"]
    say(store, restarted, "ann", 1)
    assert set(qualities(store, said["eve"])) == {0.0}


def test_two_of_five_are_distrusted(store, monitor):
    said = crowd(store, monitor, hostile=("dua", "eve"))
    assert set(qualities(store, said["dua"] + said["eve"])) == {0.0}


def test_half_of_the_users_are_never_distrusted(store, monitor):
    crowd(store, monitor, hostile=("cem", "dua", "eve"))
    report = monitor.user_report()
    assert report["distrusted"] == []
    assert set(report["spared"]) == {"cem", "dua", "eve"}


@pytest.mark.parametrize("users", [("eve",), ("ann", "eve")])
def test_alone_or_in_two_nobody_is_distrusted(store, monitor, users):
    said = crowd(store, monitor, users=users, rounds=6)
    assert not any("trust:" in reasons(store, pair_id) for pair_id in said["eve"])


def test_a_young_adapter_that_agrees_with_nobody_distrusts_nobody(store, monitor):
    for margins in ([0.0, 0.05, -0.05], [0.0, 0.0, 0.0]) * 4:
        say_together(store, monitor, dict.fromkeys(USERS, margins), version=None)
    assert monitor.user_report()["distrusted"] == []


def test_a_user_of_early_pairs_is_compared_under_the_early_version(store, monitor):
    """`eve` sent all her pairs while the adapter was wrong about half of everything; now it is right."""
    say_together(store, monitor, dict.fromkeys(USERS, [1.0, -1.0] * 6), version="v0001")
    crowd(store, monitor, users=USERS[:4], rounds=7, version="v0002")
    say(store, monitor, "eve", 1, version="v0002")
    assert monitor.user_report()["distrusted"] == []


def test_trust_comes_back_when_the_user_agrees_again(store, monitor):
    said = crowd(store, monitor)
    said["eve"] += crowd(store, monitor, hostile=(), rounds=14)["eve"]
    assert monitor.user_report()["distrusted"] == []
    assert qualities(store, said["eve"][-10:]) == [1.0] * 10
    assert not any("trust:" in reasons(store, pair_id) for pair_id in said["eve"])


def test_when_most_users_change_the_first_movers_are_heard_again(store, monitor):
    crowd(store, monitor, hostile=(), rounds=6)
    early = crowd(store, monitor, hostile=("eve",), rounds=6)
    assert set(qualities(store, early["eve"][-6:])) == {0.0}
    late = crowd(store, monitor, hostile=("cem", "dua", "eve"), rounds=10)
    assert monitor.user_report()["distrusted"] == []
    assert set(qualities(store, late["eve"][-6:])) == {1.0}
    assert all("trust:" not in reasons(store, pair_id) for user in USERS for pair_id in late[user])


def test_a_careless_user_keeps_a_part(store, monitor):
    for _ in range(10):
        margins = dict.fromkeys(USERS[:4], [2.0] * 3) | {"eve": [2.0, 2.0, -2.0]}
        careless = say_together(store, monitor, margins)["eve"]
    assert 0.1 <= qualities(store, careless)[0] <= 0.6


def test_the_vote_of_a_distrusted_user_does_not_count(store, monitor):
    crowd(store, monitor)
    pro, contra = opposite(["ann"], ["eve"])
    ids = add(store, *pro, *contra)
    assess(store, monitor, ids, margin=[2.0, -2.0])
    assert qualities(store, ids) == [1.0, 0.0]


def test_a_contradiction_is_judged_again_when_its_user_loses_trust(store, monitor):
    pro, contra = opposite(["ann"], ["eve"])
    ids = add(store, *pro, *contra)
    assess(store, monitor, ids, margin=[2.0, -2.0])
    assert qualities(store, ids) == [0.0, 0.0]
    crowd(store, monitor)
    assert qualities(store, ids) == [1.0, 0.0]


def test_the_weight_is_the_product_of_the_reasons(store, monitor):
    crowd(store, monitor, hostile=())
    ids = add(store, *(item("eve", prompt="why", chosen="because", rejected="no") for _ in range(2)))
    assess(store, monitor, ids, margin=[2.0, -5.0])
    assert qualities(store, ids) == [1.0, 0.25]
    assert reasons(store, ids[1]).startswith("near duplicate: ")
    assert " | outlier: " in reasons(store, ids[1])


def test_a_users_name_cannot_forge_a_reason(store, monitor):
    name = "x: x 1\ntrust: fine: x 1"
    said = crowd(store, monitor, hostile=(name,), users=("ann", "bob", "cem", "dua", name))
    assert set(qualities(store, said[name])) == {0.0}
    assert len(store.pairs.find(said[name][:1])[0].quality_reasons[0].splitlines()) == 1


def test_a_store_that_fails_changes_no_standing(store, monitor, monkeypatch):
    said = crowd(store, monitor, rounds=2)
    for user in ("ann", "bob", "cem", "dua"):
        say(store, monitor, user, 3)
    before = monitor.user_report()

    def fail(changes):
        raise OSError("disk full")

    ids = add(store, *(item("eve") for _ in range(6)))
    with monkeypatch.context() as patch:
        patch.setattr(store, "set_quality", fail)
        with pytest.raises(OSError, match="disk full"):
            assess(store, monitor, ids, margin=-2.0)
    assert monitor.user_report() == before
    assess(store, monitor, ids, margin=-2.0)
    assert set(qualities(store, said["eve"] + ids)) == {0.0}
