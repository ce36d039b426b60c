import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from core.errors import ConfigError
from simulator.trace import Trace
from tests.support.simulated_device import make_trace


def test_the_same_seed_gives_the_same_requests():
    assert list(make_trace(seed=3).requests()) == list(make_trace(seed=3).requests())
    assert list(make_trace(seed=3).requests()) != list(make_trace(seed=4).requests())


def test_the_number_of_requests_is_exact_across_blocks():
    requests = list(make_trace(num_requests=20_001).requests())
    assert len({request.request_id for request in requests}) == 20_001


def test_a_duration_ends_the_trace():
    requests = list(make_trace(duration_s=100, arrivals={"rate_per_s": 50}).requests())
    assert max(request.arrival_s for request in requests) < 100
    assert len(requests) == pytest.approx(5000, rel=0.06)


@given(
    process=st.sampled_from(["poisson", "constant", "gamma"]),
    rate=st.floats(0.1, 1e4),
    bursts=st.lists(
        st.builds(
            lambda start_s, duration_s, factor: {"start_s": start_s, "duration_s": duration_s, "factor": factor},
            st.floats(0, 100),
            st.floats(0.1, 100),
            st.floats(0.01, 50),
        ),
        max_size=3,
    ),
)
def test_arrivals_never_run_backwards(process, rate, bursts):
    arrivals = {"process": process, "rate_per_s": rate, "bursts": bursts}
    if process == "gamma":
        arrivals["cv"] = 3.0
    times = [request.arrival_s for request in make_trace(num_requests=500, arrivals=arrivals).requests()]
    assert times[0] >= 0
    assert all(a <= b for a, b in pairwise(times))


def test_a_burst_multiplies_the_rate_while_it_lasts():
    bursts = [{"start_s": 50, "duration_s": 50, "factor": 4}, {"start_s": 75, "duration_s": 100, "factor": 0.5}]
    trace = make_trace(duration_s=250, arrivals={"process": "constant", "rate_per_s": 20, "bursts": bursts})
    times = [request.arrival_s for request in trace.requests()]
    counted = [sum(low <= t < high for t in times) for low, high in ((0, 50), (50, 75), (75, 100), (100, 175))]
    assert counted == pytest.approx([1000, 2000, 1000, 750], abs=2)
    assert sum(t >= 175 for t in times) == pytest.approx(1500, abs=2)


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        ({"process": "poisson"}, 1.0),
        ({"process": "gamma", "cv": 3.0}, 3.0),
        ({"process": "constant"}, 0.0),
    ],
)
def test_gaps_have_the_processs_variation(arrivals, expected):
    trace = make_trace(num_requests=30_000, arrivals={"rate_per_s": 10, **arrivals})
    gaps = [b.arrival_s - a.arrival_s for a, b in pairwise(trace.requests())]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(0.1, rel=0.06)
    assert statistics.stdev(gaps) / mean == pytest.approx(expected, rel=0.06, abs=1e-6)


def test_lengths_follow_their_distribution():
    prompts = {"kind": "lognormal", "mean": 64, "sigma": 0.6, "low": 4, "high": 512}
    requests = list(make_trace(num_requests=20_000, prompt_tokens=prompts, background_share=0.3).requests())
    lengths = [request.num_prompt_tokens for request in requests]
    assert statistics.fmean(lengths) == pytest.approx(64, rel=0.03)
    assert 4 <= min(lengths) <= max(lengths) <= 512
    outputs = [request.num_output_tokens for request in requests]
    assert set(outputs) == set(range(1, 41))
    assert statistics.fmean(request.user_priority for request in requests) == pytest.approx(0.3, abs=0.02)


def test_another_output_length_leaves_arrivals_and_prompts_alone():
    first = list(make_trace().requests())
    second = list(make_trace(output_tokens={"kind": "constant", "value": 5}, background_share=0.5).requests())
    assert [(r.arrival_s, r.num_prompt_tokens) for r in first] == [
        (r.arrival_s, r.num_prompt_tokens) for r in second
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"duration_s": 5, "num_requests": 5},
        {"num_requests": None},
        {"arrivals": {"rate_per_s": 0}},
        {"arrivals": {"process": "gamma", "rate_per_s": 1}},
        {"arrivals": {"process": "poisson", "cv": 2.0, "rate_per_s": 1}},
        {"prompt_tokens": {"kind": "uniform", "low": 9, "high": 8}},
        {"prompt_tokens": {"kind": "zipf", "high": 8}},
        {"executors": 1001},
        {"args": {"slo": {"tbt_s": -1}}},
        {"args": {"nonsense": 1}},
    ],
)
def test_impossible_traces_are_refused(changes):
    with pytest.raises(ValidationError):
        make_trace(**changes)


@pytest.mark.parametrize("text", ["", "- 1", "name: x\n", "name: [", "\xff"])
def test_a_bad_file_is_named_in_the_error(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        Trace.load(path)
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        Trace.load(tmp_path / "missing.yaml")


def test_a_profile_is_found_from_the_traces_folder(tmp_path):
    path = tmp_path / "trace.yaml"
    path.write_text(
        "{name: x, num_requests: 1, arrivals: {rate_per_s: 1}, profile: p.json,"
        " prompt_tokens: {kind: constant, value: 1}, output_tokens: {kind: constant, value: 1}}"
    )
    assert Trace.load(path).profile == tmp_path / "p.json"
