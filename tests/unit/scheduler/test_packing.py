import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import ExperimentsConfig
from scheduler.packing import LAMBDA_MEMORY, Bin, Demand, best_fit, choose_candidate

EXPERIMENTS = ExperimentsConfig()
sizes = st.floats(0, 100)
bins = st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100), sizes, sizes), max_size=6).map(
    lambda rows: [Bin(str(i), *row) for i, row in enumerate(rows)]
)


def test_the_tightest_bin_wins():
    demand = Demand(2.0, 2.0)
    assert best_fit(demand, [Bin("roomy", 100, 100), Bin("tight", 3, 3)]).bin_id == "tight"


def test_both_terms_count_alike_whatever_their_units():
    demand = Demand(1e6, 0.01)
    tight_in_memory = Bin("memory", 1.1e6, 1.0)
    tight_in_both = Bin("both", 1.2e6, 0.012)
    assert best_fit(demand, [tight_in_memory, tight_in_both]).bin_id == "both"


def test_no_bin_has_room():
    assert best_fit(Demand(2.0, 1.0), [Bin("a", 1.0, 9.0), Bin("b", 9.0, 0.5)]) is None


@given(st.tuples(sizes, sizes), bins)
def test_best_fit_equals_brute_force_and_never_overfills(need, candidates):
    demand = Demand(*need)
    chosen = best_fit(demand, candidates)
    feasible = [b for b in candidates if b.fits(demand)]
    if not feasible:
        assert chosen is None
        return
    assert chosen.score(demand) == min(b.score(demand) for b in feasible)
    assert chosen.memory_used_bytes + demand.memory_bytes <= chosen.memory_capacity_bytes


def test_pruned_bytes_cost_the_memory_weight_and_more_the_more_harm_they_do():
    tight = Bin("a", 100, 100, memory_used_bytes=90)
    free = tight.score(Demand(10, 20))
    for harm in (0.0, 0.5, 1.0):
        pruned = tight.score(Demand(30, 20, pruned_bytes=20, harm=harm))
        assert pruned - free == pytest.approx(LAMBDA_MEMORY * 20 / 100 * (1 + harm))


def test_the_larger_of_two_sizes_is_pruned_for_if_its_time_is_worth_it():
    memory_is_short = Bin("a", 100, 100, memory_used_bytes=90)
    sizes = [Demand(30, 30, pruned_bytes=20, harm=0.5), Demand(10, 10)]
    assert (
        choose_candidate(sizes, memory_is_short, EXPERIMENTS) == 1
    )  # 20 % of the time for 20 % of the memory and harm
    time_is_idle = [Demand(30, 60, pruned_bytes=20, harm=0.5), Demand(10, 20)]
    assert choose_candidate(time_is_idle, memory_is_short, EXPERIMENTS) == 0
    starved = [Demand(30, 30, pruned_bytes=30, harm=1.0)]
    assert choose_candidate(starved, Bin("b", 100, 100, memory_used_bytes=100), EXPERIMENTS) == 0


def test_a_bin_is_as_full_as_before_after_a_demand_that_was_pruned_for():
    full = Bin("a", 100, 100, memory_used_bytes=100)
    assert not full.fits(Demand(30, 10, pruned_bytes=20))
    full.add(Demand(30, 10, pruned_bytes=30))
    assert (full.memory_used_bytes, full.latency_used_s) == (100, 10)
