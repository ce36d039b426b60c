import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from core.config import SchedulerConfig
from scheduler.packing import Bin, Demand, best_fit

CONFIG = SchedulerConfig()
sizes = st.floats(0, 100)
bins = st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100), sizes, sizes), max_size=6).map(
    lambda rows: [Bin(str(i), *row) for i, row in enumerate(rows)]
)


def test_the_tightest_bin_wins():
    demand = Demand(2.0, 2.0)
    assert best_fit(demand, [Bin("roomy", 100, 100), Bin("tight", 3, 3)], CONFIG).bin_id == "tight"


def test_both_terms_count_alike_whatever_their_units():
    demand = Demand(1e6, 0.01)
    tight_in_memory = Bin("memory", 1.1e6, 1.0)
    tight_in_both = Bin("both", 1.2e6, 0.012)
    assert best_fit(demand, [tight_in_memory, tight_in_both], CONFIG).bin_id == "both"


def test_no_bin_has_room():
    assert best_fit(Demand(2.0, 1.0), [Bin("a", 1.0, 9.0), Bin("b", 9.0, 0.5)], CONFIG) is None


@given(st.tuples(sizes, sizes), bins)
def test_best_fit_equals_brute_force_and_never_overfills(need, candidates):
    demand = Demand(*need)
    chosen = best_fit(demand, candidates, CONFIG)
    feasible = [b for b in candidates if b.fits(demand)]
    if not feasible:
        assert chosen is None
        return
    assert chosen.score(demand, CONFIG) == min(b.score(demand, CONFIG) for b in feasible)
    assert chosen.memory_used_bytes + demand.memory_bytes <= chosen.memory_capacity_bytes


def test_both_weights_zero_is_refused():
    with pytest.raises(ValidationError, match="cannot both be 0"):
        SchedulerConfig(lambda_memory=0, lambda_latency=0)
