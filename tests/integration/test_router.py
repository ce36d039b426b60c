"""The request router on real Ray Serve: two replicas that report what the test tells them to, and no engine."""

import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from app.main import executor_router
from benchmarks.harness.server import free_port
from core.config import AppArgs
from core.wire import ExecutorLoad
from deployments.routing.prefix_names import CALLBACK, CALLBACK_VARIABLE, prefixes_of
from deployments.routing.router import PREFIXES_KEY, REPORT_PERIOD_S

pytestmark = pytest.mark.ray


def stats(**changes):
    """Slow executors: a queue of 100 tokens is not worked off before the next report."""
    load = ExecutorLoad(
        executor_id="self",
        reported_s=time.time(),
        free_kv_bytes=9e8,
        kv_capacity_bytes=1e9,
        kv_bytes_per_token=1000,
        ttft_target_s=100.0,
        prompt_token_s=0.1,
        wait_s=1.0,
    )
    return {**asdict(load), **changes}


class Replica:
    """Answers with its number; reports what stands in the file of that number."""

    def __init__(self, directory):
        self._directory = directory
        self._number = next(number for number in range(64) if self._claim(number))

    def _claim(self, number):
        try:
            os.close(os.open(f"{self._directory}/claim-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def record_routing_stats(self):
        report = json.loads((Path(self._directory) / f"{self._number}.json").read_text())
        return {**report, "reported_s": time.time()} if report else {}

    async def __call__(self, request):
        import asyncio

        body = await request.body()
        if request.query_params.get("echo"):
            return {"body": body.decode(), "prefix": request.headers.get("x-mace-prefix")}
        await asyncio.sleep(float(request.query_params.get("sleep_s", 0)))
        return self._number


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fleet")
    port = free_port()
    fleet = Fleet(directory, f"http://127.0.0.1:{port}/")
    fleet.report({}, {}, settle_s=0)
    os.environ[CALLBACK_VARIABLE] = CALLBACK  # inherited by the proxy, as under `mace serve`
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"num_replicas": 2, "max_ongoing_requests": 4, "ray_actor_options": {"num_cpus": 0}}
    deployment = serve.deployment(request_router_config=executor_router(AppArgs()), **options)(Replica)
    serve.run(deployment.bind(str(directory)))
    yield fleet
    serve.shutdown()
    ray.shutdown()
    del os.environ[CALLBACK_VARIABLE]


class Fleet:
    def __init__(self, directory, url):
        self._directory = directory
        self._client = httpx.Client(base_url=url, timeout=20)

    def report(self, *reports, settle_s=2 * REPORT_PERIOD_S):
        """Let replicas report this, and wait until Serve has asked each of them and told the proxy."""
        for number, report in enumerate(reports):
            path = self._directory / f"{number}.json"
            path.with_suffix(".new").write_text(json.dumps(report))
            path.with_suffix(".new").rename(path)
        time.sleep(settle_s)

    def ask(self, num_tokens=10, sleep_s=0.0, **headers):
        reply = self._client.post("/", params={"sleep_s": sleep_s}, content=b"x" * 4 * num_tokens, headers=headers)
        assert reply.status_code == 200
        return int(reply.text)

    def chat(self, body):
        reply = self._client.post("/", json=body)
        assert reply.status_code == 200
        return int(reply.text)

    def echo(self, body, **headers):
        return self._client.post("/", params={"echo": 1}, json=body, headers=headers).json()

    def wait_for(self, expected, **request):
        """Ask until eight answers in a row come from the replicas expected: the reports have arrived then."""
        deadline_s = time.monotonic() + 15
        while {self.ask(**request) for _ in range(8)} != expected:
            assert time.monotonic() < deadline_s, f"requests did not settle on {expected}"


def test_requests_are_served_before_any_report(fleet):
    assert {fleet.ask() for _ in range(30)} == {0, 1}


@pytest.mark.parametrize("better", [0, 1])
def test_requests_go_to_the_replica_with_the_shorter_queue(fleet, better):
    reports = [stats(waiting_tokens=800), stats(waiting_tokens=800)]
    reports[better] = stats()
    fleet.report(*reports)
    fleet.wait_for({better})
    assert Counter(fleet.ask() for _ in range(20)) == {better: 20}


def test_a_long_prompt_goes_where_there_is_memory_and_a_short_one_where_the_queue_is_short(fleet):
    fleet.report(stats(free_kv_bytes=6e7), stats(waiting_tokens=500))  # λ: 94 % full against 51 % of the target
    fleet.wait_for({1}, num_tokens=100)
    fleet.report(stats(free_kv_bytes=6e8), stats(waiting_tokens=500))
    fleet.wait_for({0}, num_tokens=10)


def test_a_session_stays_with_its_prefix_through_the_proxy(fleet):
    fleet.report(stats(), stats(waiting_tokens=300))
    fleet.wait_for({0})
    headers = {"x-session-id": "conversation"}
    assert fleet.ask(400, **headers) == 0
    fleet.report(stats(waiting_tokens=250), stats())
    fleet.wait_for({1})
    assert fleet.ask(450, **headers) == 0
    assert fleet.ask(450) == 1


def test_a_burst_between_two_reports_is_spread(fleet):
    fleet.report(stats(), stats())
    with ThreadPoolExecutor(6) as pool:
        seen = Counter(pool.map(lambda _: fleet.ask(300, sleep_s=0.3), range(6)))
    assert seen[0] >= 2
    assert seen[1] >= 2


def test_the_next_best_serves_when_the_best_has_no_place(fleet):
    fleet.report(stats(), stats(waiting_tokens=900))
    fleet.wait_for({0})
    with ThreadPoolExecutor(6) as pool:
        seen = Counter(pool.map(lambda _: fleet.ask(1, sleep_s=1.0), range(6)))
    assert seen == {0: 4, 1: 2}


def test_requests_go_on_when_reports_are_absent_again(fleet):
    fleet.report({}, stats())
    fleet.wait_for({0, 1})


def chat(system, question):
    return {
        "model": "mace-tiny",
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}],
    }


ASTRONOMY, LAW = "You know all of the sky. " * 60, "You know all of the law. " * 60
"""1,500 bytes each: about 375 tokens, which cost 37.5 s at the speed reported."""


def test_the_proxy_names_prefixes_and_passes_the_body_on_unchanged(fleet):
    body = chat(ASTRONOMY, "Where is Mars?")
    echo = fleet.echo(body, **{"x-mace-prefix": "9;forged"})
    assert json.loads(echo["body"]) == body
    assert echo["prefix"] == prefixes_of(body).to_header().decode()
    assert fleet.echo({"model": "m", "prompt": "short"}, **{"x-mace-prefix": "9;forged"})["prefix"] is None


def test_a_request_goes_where_its_prefix_is_cached_unless_the_queue_costs_more_than_it_saves(fleet):
    sky, law = (list(prefixes_of(chat(system, "")).digests) for system in (ASTRONOMY, LAW))
    fleet.report(stats(waiting_tokens=200, **{PREFIXES_KEY: sky}), stats(**{PREFIXES_KEY: law}))
    fleet.wait_for({1})
    time.sleep(5)  # what was sent before is not believed any more
    assert [fleet.chat(chat(ASTRONOMY, f"Where is star {i}?")) for i in range(3)] == [0, 0, 0]
    assert [fleet.chat(chat(LAW, f"What says paragraph {i}?")) for i in range(3)] == [1, 1, 1]
    fleet.report(stats(waiting_tokens=800, **{PREFIXES_KEY: sky}), stats(**{PREFIXES_KEY: law}))
    time.sleep(2)
    assert fleet.chat(chat(ASTRONOMY, "Where is Venus?")) == 1


def test_a_prefix_that_was_just_sent_draws_the_next_request_before_any_report_names_it(fleet):
    fleet.report(stats(**{PREFIXES_KEY: []}), stats(waiting_tokens=100, **{PREFIXES_KEY: []}))
    fleet.wait_for({0})
    time.sleep(2)
    system = "You write verse and nothing else. " * 60
    first = fleet.chat(chat(system, "About spring"))
    assert [fleet.chat(chat(system, f"About winter {i}")) for i in range(2)] == [first, first]
