from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.wire import ExecutorLoad
from scheduler import packing
from scheduler.placement import choose_executor, predict_ttft_s


def load(executor_id="a", **changes):
    base = ExecutorLoad(
        executor_id=executor_id,
        reported_s=0.0,
        free_kv_bytes=800.0,
        kv_capacity_bytes=1000.0,
        kv_bytes_per_token=1.0,
        ttft_target_s=1.0,
        waiting_tokens=0,
        num_running=0,
        prompt_token_s=0.001,
        wait_s=0.05,
    )
    return replace(base, **changes)


def order(prompt_tokens, loads, cached=None, tau_mem=1.0):
    return [ranked.executor_id for ranked in choose_executor(prompt_tokens, loads, cached or {}, tau_mem)]


def test_the_predicted_ttft_counts_the_queue_the_prompt_and_the_cached_prefix():
    busy = load(waiting_tokens=300)
    assert predict_ttft_s(100, 0, busy) == pytest.approx(0.05 + 400 * 0.001)
    assert predict_ttft_s(100, 60, busy) == pytest.approx(0.05 + 340 * 0.001)
    assert predict_ttft_s(100, 100, busy) == pytest.approx(0.05 + 301 * 0.001)  # the last token is computed anyway


def test_the_shorter_queue_wins_and_so_does_more_free_memory():
    assert order(100, [load("a", waiting_tokens=200), load("b")]) == ["b", "a"]
    assert order(100, [load("a", free_kv_bytes=200.0), load("b")]) == ["b", "a"]


def test_the_longest_cached_prefix_wins_between_equals_and_loses_to_a_queue_that_costs_more_than_it_saves(
    monkeypatch,
):
    assert order(200, [load("a"), load("b")], {"b": 150}) == ["b", "a"]
    monkeypatch.setattr(packing, "LAMBDA_MEMORY", 0.0)
    assert order(200, [load("a"), load("b", waiting_tokens=149)], {"b": 150}) == ["b", "a"]
    assert order(200, [load("a"), load("b", waiting_tokens=151)], {"b": 150}) == ["a", "b"]


@pytest.mark.parametrize(("memory", "latency", "winner"), [(1.0, 0.1, "slow"), (0.1, 1.0, "full")])
def test_the_weights_say_what_counts_more(monkeypatch, memory, latency, winner):
    monkeypatch.setattr(packing, "LAMBDA_MEMORY", memory)
    monkeypatch.setattr(packing, "LAMBDA_LATENCY", latency)
    slow, full = load("slow", waiting_tokens=500), load("full", free_kv_bytes=300.0)
    assert order(100, [slow, full])[0] == winner


def test_tau_mem_is_a_hard_limit(monkeypatch):
    monkeypatch.setattr(packing, "LAMBDA_MEMORY", 0.01)
    tight, slow = load("tight", free_kv_bytes=150.0), load("slow", waiting_tokens=800)
    assert order(120, [tight, slow], tau_mem=1.0)[0] == "tight"
    assert order(120, [tight, slow], tau_mem=0.9)[0] == "slow"


def test_if_none_meets_the_target_the_lowest_predicted_ttft_wins_among_those_with_memory():
    late, later = load("late", waiting_tokens=2000), load("later", waiting_tokens=3000)
    full = load("full", waiting_tokens=1500, free_kv_bytes=0.0)
    assert order(100, [later, full, late]) == ["late", "later", "full"]


def test_an_executor_that_never_measured_a_prompt_is_last_among_those_with_memory():
    new, late = load("new", prompt_token_s=None), load("late", waiting_tokens=5000)
    ranking = choose_executor(10, [new, late], {}, 1.0)
    assert [ranked.executor_id for ranked in ranking] == ["late", "new"]
    assert ranking[1].predicted_ttft_s == float("inf")


def test_equal_executors_are_ordered_by_id_and_no_executors_give_no_ranking():
    assert order(10, [load("c"), load("a"), load("b")]) == ["a", "b", "c"]
    assert order(10, []) == []


taus = st.floats(0.1, 1.0)
any_load = st.builds(
    load,
    kv_capacity_bytes=st.just(1000.0),
    free_kv_bytes=st.floats(0.0, 1000.0),
    waiting_tokens=st.integers(0, 3000),
    num_running=st.integers(0, 64),
    prompt_token_s=st.one_of(st.none(), st.floats(1e-6, 0.01)),
    wait_s=st.floats(0.0, 2.0),
)
fleets = st.lists(any_load, min_size=1, max_size=6).map(
    lambda loads: [replace(one, executor_id=f"e{i}") for i, one in enumerate(loads)]
)
prompts = st.integers(1, 1500)


@given(prompts, fleets, taus, st.integers(0, 1500))
def test_one_over_a_limit_is_never_chosen_while_another_is_within_both(prompt_tokens, fleet, tau_mem, cached):
    ranking = choose_executor(prompt_tokens, fleet, {"e0": cached}, tau_mem)
    within = [ranked for ranked in ranking if ranked.has_memory and ranked.meets_target]
    assert ranking[: len(within)] == within
    assert all(ranked.room is not None for ranked in within)
    assert sorted(ranked.executor_id for ranked in ranking) == sorted(one.executor_id for one in fleet)
    beyond = [ranked for ranked in ranking[len(within) :] if ranked.has_memory]
    assert beyond == sorted(beyond, key=lambda ranked: ranked.predicted_ttft_s)


@given(prompts, fleets, taus, st.randoms(use_true_random=False))
def test_the_ranking_does_not_depend_on_the_order_of_the_reports(prompt_tokens, fleet, tau_mem, random):
    shuffled = list(fleet)
    random.shuffle(shuffled)
    assert order(prompt_tokens, shuffled, tau_mem=tau_mem) == order(prompt_tokens, fleet, tau_mem=tau_mem)


@given(prompts, fleets, taus, st.integers(1, 5000))
def test_more_waiting_tokens_never_make_an_executor_more_attractive(prompt_tokens, fleet, tau_mem, more):
    busier = [replace(fleet[0], waiting_tokens=fleet[0].waiting_tokens + more), *fleet[1:]]
    before = order(prompt_tokens, fleet, tau_mem=tau_mem).index("e0")
    assert order(prompt_tokens, busier, tau_mem=tau_mem).index("e0") >= before


@given(prompts, fleets, taus, st.integers(1, 1500))
def test_a_longer_cached_prefix_never_makes_an_executor_less_attractive(prompt_tokens, fleet, tau_mem, cached):
    before = order(prompt_tokens, fleet, tau_mem=tau_mem).index("e0")
    assert order(prompt_tokens, fleet, {"e0": cached}, tau_mem).index("e0") <= before
