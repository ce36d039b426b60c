"""What the edge of the HTTP chain measures, and tells the engine."""

import asyncio
import json

import pytest

from app.http.edge import measure_edge
from app.http.guard import set_request_class
from app.http.request import RequestChain
from core.config import SloConfig
from deployments.monitors.edge import REPORT_S, EdgeMeter

STREAM = b"text/event-stream; charset=utf-8"


class Edge:
    """A chain with the step, before an application that answers with `parts`: (delay in seconds, bytes)."""

    def __init__(self, parts, kind=STREAM, status=200, slo=None):
        self.parts, self.kind, self.status = parts, kind, status
        self.reports = []
        self.slo = slo or SloConfig(ttft_s=0.05, tbt_s=0.05)

    async def _answer(self, scope, receive, send):
        await receive()
        headers = [(b"content-type", self.kind)]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for number, (delay_s, part) in enumerate(self.parts):
            await asyncio.sleep(delay_s)
            more = number < len(self.parts) - 1
            await send({"type": "http.response.body", "body": part, "more_body": more})

    def ask(self, path="/v1/chat/completions", headers=(), **body):
        """Ask once, and wait for the report; returns what the meter shows."""
        data = json.dumps(body).encode()

        async def receive():
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(_):
            pass

        async def tell(report):
            self.reports.append(report)

        async def run():
            meter = EdgeMeter(self.slo, tell)
            chain = RequestChain(self._answer, [set_request_class, measure_edge(meter)], 10_000, lambda _: None)
            await chain({"type": "http", "method": "POST", "path": path, "headers": list(headers)}, receive, send)
            shown = meter.to_wire()
            await asyncio.sleep(REPORT_S + 0.1)
            return shown

        return asyncio.run(run())


def test_a_stream_gives_its_first_token_and_its_gaps_and_the_engine_hears_of_them_once():
    edge = Edge([(0.08, b"data: 1\n\n"), (0.02, b"data: 2\n\n"), (0.07, b"data: 3\n\n")])
    shown = edge.ask(stream=True)["interactive"]
    assert shown["ttft"]["count"] == 1
    assert shown["ttft"]["attainment"] == 0
    assert shown["ttft"]["p50_s"] == pytest.approx(0.08, abs=0.03)
    assert shown["tbt"]["count"] == 2
    assert shown["tbt"]["attainment"] == 0.5
    (report,) = edge.reports
    assert (report.num_gaps, report.num_late_gaps, report.num_first, report.num_late_first) == (2, 1, 1, 1)
    assert report.gap_p99_s == pytest.approx(0.07, abs=0.03)


def test_parts_that_leave_together_are_one_chunk():
    edge = Edge([(0, b"data: role\n\n"), (0, b"data: 1\n\n"), (0.02, b"data: 2\n\n"), (0, b"data: [DONE]\n\n")])
    assert edge.ask(stream=True)["interactive"]["tbt"]["count"] == 1


def test_an_answer_in_one_piece_has_no_first_token_and_tells_the_engine_nothing():
    edge = Edge([(0.01, b"{}")], kind=b"application/json")
    assert edge.ask()["interactive"] == {"ttft": None, "tbt": None}
    assert edge.reports == []


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        ("/v1/chat/completions", [], {"service_tier": "flex"}),
        ("/v1/completions", [], {"priority": 3}),
        ("/v1/messages", [], {"service_tier": "flex"}),
        ("/v1/messages", [(b"X-Vllm-Priority", b"2")], {}),
    ],
)
def test_background_requests_are_counted_apart_and_their_first_tokens_are_no_miss(path, headers, body):
    edge = Edge([(0.08, b"data: 1\n\n"), (0.02, b"data: 2\n\n")])
    shown = edge.ask(path, headers, stream=True, **body)
    assert shown["background"]["ttft"]["count"] == 1
    assert shown["interactive"]["ttft"] is None
    assert edge.reports[0].num_first == 0
    assert edge.reports[0].num_gaps == 1


def test_a_route_that_says_it_has_begun_has_no_first_token_by_that():
    parts = [(0, b'event: response.created\ndata: {"type":"response.created"}\n\n')]
    parts += [(0.06, b"event: response.output_text.delta\n\n"), (0.02, b"event: response.output_text.delta\n\n")]
    shown = Edge(parts).ask("/v1/responses", stream=True)["interactive"]
    assert shown["ttft"]["p50_s"] > 0.05
    assert shown["tbt"]["count"] == 1


def test_streams_with_tools_have_no_gaps():
    edge = Edge([(0.01, b"data: 1\n\n"), (0.2, b"data: 2\n\n")])
    shown = edge.ask(stream=True, tools=[{"type": "function"}])["interactive"]
    assert (shown["ttft"]["count"], shown["tbt"]) == (1, None)


def test_errors_and_other_routes_are_not_measured():
    assert Edge([(0, b"{}")], b"application/json", status=500).ask(stream=True)["interactive"]["ttft"] is None
    assert Edge([(0, b"data: 1\n\n")]).ask("/v1/feedback", stream=True)["interactive"]["ttft"] is None


def test_training_held_back_for_nothing_is_said_with_a_target_that_would_do():
    async def run():
        meter = EdgeMeter(SloConfig(ttft_s=1.0, tbt_s=0.1), None)
        note = meter.stream("interactive", 0.0)
        for number in range(10):
            note(0.2 * (number + 1))
        return meter.warnings(0.5), meter.warnings(1.0)

    none, (warning,) = asyncio.run(run())
    assert none == []
    assert "0.3 s would leave room" in warning
