"""A device that becomes twice as slow in the middle of a trace, with training on and a TBT target close above it."""

import pytest

from core.dpo_slices import HEAD_CHUNK_TOKENS
from core.types import SliceKind
from scheduler.memory.arena import ArenaModel, ArenaNeed
from simulator.cluster import Simulation
from simulator.executor import Options
from simulator.hardware import hardware_of
from simulator.statistics import Statistics
from tests.support.simulated_device import DIMS, make_profile, make_trace

_AT_S = 20.0
_TBT_S = 0.06


class Recorder(Statistics):
    """Remembers each iteration that brought tokens: its end, its gap and how many requests waited for it."""

    def __init__(self, slo, bucket_s):
        super().__init__(slo, bucket_s)
        self.gaps = []
        self._end_s = 0.0

    def add_work(self, start_s, end_s, forward_s, slices_s):
        self._end_s = end_s  # the backlog keeps iterations single: their work is counted just before their tokens
        super().add_work(start_s, end_s, forward_s, slices_s)

    def add_gap(self, gap_s, weight):
        self.gaps.append((self._end_s, gap_s, weight))
        return super().add_gap(gap_s, weight)


def attainment(gaps):
    return sum(weight for _, gap_s, weight in gaps if gap_s <= _TBT_S) / sum(weight for _, _, weight in gaps)


def record(*, adapt, over_s=0.0):
    """What happens on a device whose clock falls to half, at once or in `over_s` seconds."""
    trace = make_trace(
        duration_s=60,
        arrivals={"process": "constant", "rate_per_s": 8.0},
        prompt_tokens={"kind": "constant", "value": 40},
        output_tokens={"kind": "constant", "value": 100},
        slow_down={"at_s": _AT_S, "factor": 2.0, "over_s": over_s},
        args={
            "slo": {"ttft_s": 1.0, "tbt_s": _TBT_S},
            "scheduler": {"slack_fraction": 0.92},
            "engine": {"kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 256},
        },
    )
    statistics = Recorder(trace.args.slo, 1.0)
    hardware = hardware_of(make_profile(), DIMS, trace.args)
    Simulation(trace, hardware, Options(adapt=adapt), statistics=statistics).run()
    return statistics


def simulate(*, adapt):
    """Gaps before the slow-down, in the first 50 iterations after it, and later; and pairs trained later."""
    statistics = record(adapt=adapt)
    before = [gap for gap in statistics.gaps if gap[0] < _AT_S]
    after = [gap for gap in statistics.gaps if gap[0] >= _AT_S]
    pairs_later = sum(n for bucket, n in statistics.pairs_per_bucket.items() if bucket > _AT_S + 5)
    return before, after[:50], after[50:], pairs_later


def test_a_stale_profile_heals_within_fifty_iterations():
    before, first, later, pairs_later = simulate(adapt=True)
    assert attainment(before) > 0.99
    assert attainment(first[:5]) < 0.9, "the slow-down must be felt, or this test shows nothing"
    assert attainment(first[-25:]) > 0.99
    assert attainment(later) > 0.99
    assert pairs_later > 0, "training goes on in the time that is left"


def test_without_learning_the_targets_are_missed_for_good():
    before, first, later, _ = simulate(adapt=False)
    assert attainment(before) > 0.99
    assert attainment(first) < 0.7
    assert attainment(later) < 0.7


@pytest.mark.parametrize("over_s", [0.0, 1.0, 10.0])
def test_on_a_clock_that_falls_to_half_tokens_are_in_time_again_within_five_seconds(over_s):
    gaps = record(adapt=True, over_s=over_s).gaps
    after = [[gap for gap in gaps if start_s <= gap[0] < start_s + 1] for start_s in range(int(_AT_S), 60)]
    assert min(attainment(second) for second in after[5:]) > 0.99
    without = record(adapt=False, over_s=over_s).gaps
    assert attainment([gap for gap in without if gap[0] >= _AT_S + 5 + over_s]) < 0.7


def test_hardware_needs_the_size_of_the_kv_cache():
    from core.errors import ConfigError

    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        hardware_of(make_profile(), DIMS, make_trace().args)


def test_the_profiled_device_is_the_profile():
    profile = make_profile()
    trace = make_trace(args={"engine": {"kv_cache_memory_bytes": 1 << 20}})
    hardware = hardware_of(profile, DIMS, trace.args)
    assert hardware.kv_tokens == (1 << 20) // 512
    assert hardware.profile.latency.slice_s(SliceKind.BACKWARD_LAYER, 512) == pytest.approx(0.0039)


def test_the_arena_holds_the_largest_slice_by_the_planners_own_prediction():
    trace = make_trace(args={"engine": {"kv_cache_memory_bytes": 1 << 26}})
    limits = hardware_of(make_profile(), DIMS, trace.args).limits
    need = ArenaNeed(limits.dims, trace.args.lora.rank, HEAD_CHUNK_TOKENS)
    arena = ArenaModel(limits.arena_fixed_bytes, limits.arena_bytes_per_token, need)
    assert arena.predict(trace.args.training.max_slice_tokens) < limits.arena_bytes
