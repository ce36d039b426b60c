"""A request that comes while the engine trains, in virtual time: the production planner and the worker's rules."""

import pytest

from core.types import SliceKind
from simulator.cluster import Simulation
from tests.support.simulated_device import KnownDevice, make_hardware, make_trace


def run(rate_per_s, pairs_per_s):
    trace = make_trace(
        num_requests=300,
        arrivals={"rate_per_s": rate_per_s},
        prompt_tokens={"kind": "lognormal", "mean": 128, "sigma": 0.5, "low": 16, "high": 400},
        finetune={"pairs_per_s": pairs_per_s},
        args={"slo": {"ttft_s": 1.0, "tbt_s": 0.2}},
    )
    return Simulation(trace, make_hardware()).run()


@pytest.mark.parametrize("rate_per_s", [1, 4, 10])
def test_training_adds_a_fifth_to_the_time_to_the_first_token_and_one_slice(rate_per_s):
    quiet, busy = run(rate_per_s, 0), run(rate_per_s, None)
    assert busy.pairs_per_s > 150
    longest_s = 1.2 * KnownDevice().slice_s(SliceKind.BACKWARD_LAYER, 1024)
    for percent in (50, 90, 99):
        limit_s = 1.2 * quiet.ttft.percentile(percent) + longest_s
        assert busy.ttft.percentile(percent) <= limit_s, percent
