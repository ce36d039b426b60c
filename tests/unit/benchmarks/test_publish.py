"""The traffic around a publish is the same for all modes, and the numbers are of the requests that they name."""

import pytest

from benchmarks.harness.client import RequestRecord
from benchmarks.studies.publish import CostOptions, Run, Served, draw_arrivals, summarize

OPTIONS = CostOptions(num_systems=3, system_tokens=64, question_tokens=8, before=20, after=4)


def served(arrivals, published_s, cached=0, ttft_s=0.1):
    """All requests sent when due, those before the publish with everything cached."""
    return [
        Served(
            a,
            RequestRecord(a.request_id, a.arrival_s, a.arrival_s, a.arrival_s + ttft_s),
            cached if a.arrival_s >= published_s else len(a.prompt) - 1,
        )
        for a in arrivals
    ]


@pytest.fixture
def run():
    arrivals = draw_arrivals(OPTIONS, 100, seed=1)
    began_s = arrivals[OPTIONS.before - 1].arrival_s
    ended_s = began_s + 0.5
    return Run("cold", OPTIONS, served(arrivals, ended_s), began_s, ended_s)


def test_a_seed_is_one_traffic_and_seeds_share_their_system_prompts():
    one, again, other = (draw_arrivals(OPTIONS, 100, seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    heads = [{tuple(a.prompt[:64]) for a in arrivals} for arrivals in (one, other)]
    assert heads[0] == heads[1]
    assert len(heads[0]) == 3
    assert len({tuple(a.prompt) for a in one}) == len(one)
    assert [a.arrival_s for a in one] == sorted(a.arrival_s for a in one)


def test_the_first_requests_are_those_of_the_live_name_sent_after_the_publish(run):
    expected = [s for s in run.served if s.sent_s >= run.publish_ended_s and not s.arrival.to_base][:4]
    assert run.first == expected
    assert len(run.first) == 4
    assert len({s.arrival.system for s in run.openers}) == len(run.openers)
    assert run.openers[0] is run.first[0]
    assert {id(s) for s in run.during}.isdisjoint({id(s) for s in run.first})
    assert all(run.publish_began_s <= s.sent_s < run.publish_ended_s for s in run.during)
    assert all(s.arrival.to_base for s in [*run.base(after=True), *run.base(after=False)])


def test_the_summary_counts_computed_tokens_and_hits(run):
    summary = summarize([run])
    assert summary["computed_tokens"] == 4 * 72
    assert summary["base_hit_share_before"] == pytest.approx(71 / 72, abs=1e-4)
    assert summary["base_hit_share_after"] == 0.0
    assert summary["ttft_ms"] == {"requests": 4, "p50": 100.0, "p99": 100.0}


def test_nothing_to_count_is_no_number(run):
    run.served = [s for s in run.served if not s.arrival.to_base]
    assert summarize([run])["base_hit_share_after"] is None
