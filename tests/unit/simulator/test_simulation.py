import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from simulator.cluster import Simulation
from simulator.executor import Options
from tests.support.simulated_device import KnownDevice, make_hardware, make_trace


class Watched:
    """The simulation's router, with every executor's books checked at each call."""

    def __init__(self, simulation):
        self._simulation = simulation
        self._router = simulation.router
        self.ended_requests = []
        simulation.router = self

    def choose(self, request, now_s):
        self._check()
        return self._router.choose(request, now_s)

    def ended(self, request, executor):
        self._check()
        self.ended_requests.append(request)
        self._router.ended(request, executor)

    def _check(self):
        for executor in self._simulation.executors:
            executor.requests.running.check_integrity()
            executor.planner.memory.check_integrity()
            assert executor.requests.waiting_tokens == sum(
                r.target for r in executor.requests.waiting.iterate(0.0)
            )


def simulate(trace, *, kv_tokens=20_000, **options):
    log = []
    hardware = make_hardware(kv_tokens=kv_tokens, max_tokens=trace.args.engine.max_num_batched_tokens)
    simulation = Simulation(trace, hardware, Options(**options), write_log=log.append)
    watched = Watched(simulation)
    return simulation.run(), [json.loads(line) for line in log], watched.ended_requests


traces = st.builds(
    lambda policy, seats, tokens, pairs_per_s, rate, executors, background_share, seed: make_trace(
        num_requests=60,
        seed=seed,
        executors=executors,
        background_share=background_share,
        arrivals={"rate_per_s": rate},
        finetune={"pairs_per_s": pairs_per_s},
        args={
            "slo": {"ttft_s": 0.5, "tbt_s": 0.05},
            "scheduler": {"policy": policy},
            "engine": {"max_num_seqs": seats, "max_num_batched_tokens": tokens},
        },
    ),
    st.sampled_from(["mace", "inference_only", "periodic", "continuous"]),
    st.integers(1, 12),
    st.sampled_from([64, 256, 2048]),
    st.sampled_from([None, 0.0, 40.0]),
    st.sampled_from([3.0, 30.0, 300.0]),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 1000),
)


@settings(max_examples=40, deadline=None)
@given(trace=traces, kv_tokens=st.sampled_from([260, 700, 20_000]), noise=st.booleans())
def test_every_request_gets_exactly_its_tokens(trace, kv_tokens, noise):
    result, log, ended = simulate(trace, kv_tokens=kv_tokens, noise=noise)
    asked = {r.request_id: r for r in trace.requests()}
    assert sorted(r.request_id for r in ended) == sorted(asked)
    assert all(r.generated == asked[r.request_id].num_output_tokens for r in ended)
    found = result.statistics
    assert found.output_tokens == sum(r.num_output_tokens for r in asked.values())
    assert found.tbt.total == found.output_tokens - len(asked)
    assert found.prompt_tokens >= sum(r.num_prompt_tokens for r in asked.values())
    assert (found.prompt_tokens == sum(r.num_prompt_tokens for r in asked.values())) or found.preemptions
    assert result.num_finished == len(asked)
    assert 0 < result.utilisation <= 1
    times = [line["time_s"] for line in log]
    assert all(a <= b for a, b in pairwise(times))
    for request in ended:
        assert request.arrival_s < request.first_token_s


@settings(max_examples=20, deadline=None)
@given(trace=traces, kv_tokens=st.sampled_from([260, 20_000]), noise=st.booleans())
def test_stretches_change_nothing(trace, kv_tokens, noise):
    fast, fast_log, _ = simulate(trace, kv_tokens=kv_tokens, noise=noise, fast=True)
    slow, slow_log, _ = simulate(trace, kv_tokens=kv_tokens, noise=noise, fast=False)
    key = json.dumps
    assert sorted(fast_log, key=key) == sorted(slow_log, key=key)
    assert _close(fast.to_json(), slow.to_json())


def _close(a, b):
    """Equal but for the order of additions."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    return a == b or a == pytest.approx(b, rel=1e-9)


def test_the_same_seed_gives_the_same_event_log_byte_for_byte():
    logs = []
    for _ in range(2):
        lines: list[str] = []
        Simulation(make_trace(executors=2), make_hardware(), write_log=lines.append).run()
        logs.append("".join(lines).encode())
    assert logs[0] == logs[1]
    assert logs[0].count(b'"finished"') == 200


def test_another_seed_draws_other_noise():
    first, second = (simulate(make_trace(seed=seed))[1] for seed in (1, 2))
    assert first != second


def test_inference_only_trains_nothing_beside_a_full_backlog():
    args = {"scheduler": {"policy": "inference_only"}}
    result, _, _ = simulate(make_trace(args=args))
    assert result.statistics.slices == result.statistics.pairs == 0
    assert simulate(make_trace())[0].statistics.pairs > 0


def test_training_fills_the_idle_time_and_keeps_the_targets():
    slo = {"ttft_s": 1.0, "tbt_s": 0.1}
    result, _, _ = simulate(make_trace(duration_s=60, arrivals={"rate_per_s": 5}, args={"slo": slo}))
    assert result.utilisation > 0.8
    assert result.slo_attainment is not None
    assert result.slo_attainment > 0.99
    assert result.statistics.tbt.percentile(99) <= 0.1


def test_pairs_are_trained_as_they_come_and_not_before():
    trace = make_trace(duration_s=50, arrivals={"rate_per_s": 1}, finetune={"pairs_per_s": 4.0})
    result, _, _ = simulate(trace)
    assert result.statistics.pairs == 200 // 8 * 8 - 8 or result.statistics.pairs == 200
    assert result.pairs_per_s == pytest.approx(4.0, rel=0.06)


def test_a_saturated_executor_preempts_and_recovers():
    trace = make_trace(arrivals={"rate_per_s": 300}, finetune={"pairs_per_s": 0.0})
    result, log, ended = simulate(trace, kv_tokens=400)
    assert result.statistics.preemptions > 0
    assert sum(line["event"] == "preempted" for line in log) == result.statistics.preemptions
    assert len(ended) == 200


def test_a_request_that_never_fits_is_refused_by_name():
    with pytest.raises(ConfigError, match="r0 of 50"):
        simulate(make_trace(prompt_tokens={"kind": "constant", "value": 50}), kv_tokens=50)


def test_more_seats_than_tokens_is_refused():
    with pytest.raises(ConfigError, match="max_num_seqs"):
        simulate(make_trace(args={"engine": {"max_num_seqs": 100, "max_num_batched_tokens": 64}}))


def test_requests_spread_over_executors():
    for router in ("placement", "least_loaded"):
        trace = make_trace(
            num_requests=400, executors=4, arrivals={"rate_per_s": 200}, finetune={"pairs_per_s": 0}
        )
        _, log, _ = simulate(trace, router=router)
        placed = [line["executor"] for line in log if line["event"] == "arrived"]
        assert min(placed.count(i) for i in range(4)) > 60


def test_batch_requests_wait_behind_interactive_ones():
    trace = make_trace(background_share=0.5, arrivals={"rate_per_s": 300}, args={"engine": {"max_num_seqs": 4}})
    classes = simulate(trace)[0].to_json()["classes"]
    assert classes["background"]["ttft"]["p50_s"] > classes["interactive"]["ttft"]["p50_s"]


def test_planners_learn_from_every_nth_iteration():
    made = []

    def new_predictor():
        made.append(KnownDevice())
        return made[-1]

    for every in (1, 4):
        trace = make_trace(finetune={"pairs_per_s": 0})
        hardware = make_hardware(new_predictor=new_predictor)
        iterations = Simulation(trace, hardware, Options(observe_every=every)).run().statistics.iterations
        assert made.pop().num_observed == iterations // every
    Simulation(make_trace(), make_hardware(new_predictor=new_predictor), Options(adapt=False)).run()
    assert made.pop().num_observed == 0
