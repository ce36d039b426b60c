import asyncio
import inspect
import itertools
import time
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
    RequestProtocol,
    StreamingHTTPRequest,
)
from ray.serve.request_router import PendingRequest, RequestRouter

from core.wire import ExecutorLoad
from deployments.routing.router import (
    BYTES_PER_TOKEN,
    STALE_S,
    ExecutorRouter,
    load_of,
    prompt_tokens_of,
    scope_of,
)

DEPLOYMENT = DeploymentID("Executor", "mace")
request_ids = (f"internal-{i}" for i in itertools.count())


def stats(**changes):
    load = ExecutorLoad(
        executor_id="own name",
        reported_s=time.time(),
        free_kv_bytes=9e8,
        kv_capacity_bytes=1e9,
        kv_bytes_per_token=1000,
        ttft_target_s=1.0,
        prompt_token_s=0.001,
        wait_s=0.01,
    )
    return {**asdict(load), **changes}


def replica(name, **changes):
    return SimpleNamespace(replica_id=ReplicaID(name, DEPLOYMENT), routing_stats=stats(**changes))


def request(num_tokens=100, session="", headers=None):
    if headers is None:
        headers = [(b"host", b"x"), (b"content-length", str(num_tokens * BYTES_PER_TOKEN).encode())]
    metadata = RequestMetadata("r", next(request_ids), session_id=session, _request_protocol=RequestProtocol.HTTP)
    body = StreamingHTTPRequest({"type": "http", "headers": headers}, proxy_actor_name="proxy")
    return PendingRequest([cloudpickle.dumps(body)], {}, metadata, future=SimpleNamespace())


@pytest.fixture
def router():
    router = ExecutorRouter(DEPLOYMENT, DeploymentHandleSource.PROXY)
    router.initialize_state(tau_mem=0.9)
    return router


def ranks(router, replicas, pending):
    chosen = asyncio.run(router.choose_replicas(replicas, pending))
    return [[one.replica_id.unique_id for one in rank] for rank in chosen]


def estimate(pending):
    return prompt_tokens_of(scope_of(pending))


def test_the_prompt_is_estimated_from_the_content_length():
    assert estimate(request(250)) == 250
    assert estimate(request(headers=[(b"transfer-encoding", b"chunked")])) == 1
    assert estimate(request(headers=[(b"content-length", b"-7")])) == 1
    assert estimate(request(headers=[(b"content-length", b"9" * 5000)])) == 1
    call = PendingRequest(["an argument"], {}, RequestMetadata("r", "i"), future=SimpleNamespace())
    assert estimate(call) == 1


def test_a_load_is_named_after_the_replica_and_foreign_stats_are_none():
    assert load_of("replica", stats()).executor_id == "replica"
    assert load_of("replica", {}) is None
    assert load_of("replica", {**stats(), "of_another_version": 1}) is None


def test_replicas_are_ranked_one_a_rank_by_what_they_report(router):
    fleet = [replica("busy", waiting_tokens=500), replica("free"), replica("full", free_kv_bytes=0.0)]
    assert ranks(router, fleet, request()) == [["free"], ["busy"], ["full"]]


def test_one_replica_is_returned_whatever_it_reports(router):
    alone = SimpleNamespace(replica_id=ReplicaID("alone", DEPLOYMENT))  # has no stats to look at
    assert ranks(router, [alone], None) == [["alone"]]
    assert ranks(router, [alone], request()) == [["alone"]]


@pytest.mark.parametrize(
    "changes", [{"reported_s": time.time() - STALE_S - 60}, {"prompt_token_s": None}, {"surprise": 1}]
)
def test_a_missing_stale_or_unmeasured_report_makes_it_two_choices_at_random(router, changes):
    fleet = [replica("a", waiting_tokens=500), replica("b"), replica("c", **changes)]
    seen = Counter()
    for _ in range(200):
        (rank,) = ranks(router, fleet, request())
        assert len(set(rank)) == 2
        seen.update(rank)
    assert set(seen) == {"a", "b", "c"}


def test_what_was_sent_since_the_report_counts_so_that_a_burst_is_spread(router):
    fleet = [replica(name) for name in "abc"]
    first = Counter(ranks(router, fleet, request(200))[0][0] for _ in range(30))
    assert first == {"a": 10, "b": 10, "c": 10}


@pytest.mark.parametrize("hook", ["choose_replicas", "on_request_routed", "on_request_completed"])
def test_the_hooks_are_those_that_serve_calls(hook):
    ours, theirs = (inspect.signature(getattr(router, hook)) for router in (ExecutorRouter, RequestRouter))
    assert list(ours.parameters) == list(theirs.parameters)


def test_requests_that_were_answered_since_the_report_do_not_drive_the_next_ones_away(router):
    near, far = replica("near"), replica("far", wait_s=0.02)
    for _ in range(20):
        pending = request(200)
        assert ranks(router, [near, far], pending)[0] == ["near"]
        router.on_request_routed(pending, near.replica_id, None)
        router.on_request_completed(near.replica_id, pending.metadata.internal_request_id)


def test_a_queue_gets_shorter_with_the_age_of_its_report(router):
    def fleet(age_s):
        return [replica("queued", waiting_tokens=400, reported_s=time.time() - age_s), replica("slow", wait_s=0.2)]

    assert ranks(router, fleet(0.0), request())[0] == ["slow"]
    assert ranks(router, fleet(0.1), request())[0] == ["slow"]
    assert ranks(router, fleet(0.35), request())[0] == ["queued"]
    assert ranks(router, fleet(5.0), request())[0] == ["queued"]
    assert ranks(router, fleet(-5.0), request())[0] == ["slow"]  # its clock is ahead


def test_a_new_report_replaces_what_was_sent_before_it(router):
    a, b = replica("a"), replica("b", waiting_tokens=150)
    assert ranks(router, [a, b], request(200))[0] == ["a"]
    assert ranks(router, [a, b], request(200))[0] == ["b"]  # 200 were sent to a
    a.routing_stats = stats(reported_s=time.time())
    assert ranks(router, [a, b], request(200))[0] == ["a"]  # which the new report has done with


def test_a_session_returns_to_the_replica_that_has_its_prefix_unless_that_is_too_busy(router):
    fleet = [replica("a"), replica("b")]
    home = ranks(router, fleet, request(300, "s"))[0][0]
    for one in fleet:
        one.routing_stats = stats(reported_s=time.time())
    other = next(one for one in fleet if one.replica_id.unique_id != home)
    same = next(one for one in fleet if one is not other)
    same.routing_stats = stats(waiting_tokens=200)
    assert ranks(router, fleet, request(400, "s"))[0] == [home]
    same.routing_stats = stats(waiting_tokens=700)
    assert ranks(router, fleet, request(400, "s"))[0] != [home]


def test_a_ranking_that_fails_still_gives_the_request_an_executor(router):
    """Serve drops the exception and would never answer the request."""
    fleet = [replica("a"), replica("b", waiting_tokens="many")]
    assert sorted(ranks(router, fleet, request())[0]) == ["a", "b"]


def test_the_books_forget_replicas_that_are_gone(router):
    fleet = [replica(name) for name in "abc"]
    for _ in range(9):
        ranks(router, fleet, request())
    ranks(router, fleet[:2], request())
    # It is back: nothing that was sent to it counts any more, while the others have three and four requests.
    assert [ranks(router, fleet, request())[0] for _ in range(3)] == [["c"]] * 3


def test_a_session_sticks_to_the_replica_that_took_it_not_to_the_one_proposed(router):
    fleet = [replica("a"), replica("b", wait_s=0.02)]
    first = request(session="s")
    proposed, other = (rank[0] for rank in ranks(router, fleet, first))
    taker = next(one.replica_id for one in fleet if one.replica_id.unique_id == other)
    router.on_request_routed(first, taker, None)
    assert proposed != other
    later = time.time() + 1  # reports that know of the request
    fleet = [replica("a", reported_s=later), replica("b", wait_s=0.02, reported_s=later)]
    assert ranks(router, fleet, request(session="s"))[0] == [other]


def test_a_request_that_nobody_takes_backs_off(router):
    pending = request()
    ranks(router, [replica("a"), replica("b")], pending)
    assert pending.routing_context.should_backoff
    alone = request()
    ranks(router, [replica("a")], alone)
    assert alone.routing_context.should_backoff
