import asyncio

import pytest

from alignment.records.pairs import StoredResponse
from core.errors import ControlUnavailableError
from deployments.monitors.response_log import ResponseLog


class Sink:
    """Where responses end up."""

    def __init__(self):
        self.stored = []
        self.is_down = False

    async def put_responses(self, responses):
        if self.is_down:
            raise ControlUnavailableError("away")
        self.stored += responses
        return len(responses)


def response(number):
    return StoredResponse(f"r{number}", 0, "q", "a")


def test_what_waits_is_committed_in_order_and_once():
    async def scenario():
        sink = Sink()
        log = ResponseLog(sink.put_responses)
        for number in range(1200):
            log.add(response(number))
        await asyncio.gather(log.flush(), log.flush())
        return sink

    assert [r.response_id for r in asyncio.run(scenario()).stored] == [f"r{n}" for n in range(1200)]


def test_nothing_is_lost_while_control_is_away():
    async def scenario():
        sink = Sink()
        log = ResponseLog(sink.put_responses)
        log.add(response(1))
        sink.is_down = True
        with pytest.raises(ControlUnavailableError):
            await log.flush()
        sink.is_down = False
        await log.flush()
        return sink

    assert len(asyncio.run(scenario()).stored) == 1


def test_the_buffer_is_bounded_and_drops_the_oldest(monkeypatch):
    monkeypatch.setattr("deployments.monitors.response_log._MAX_WAITING", 3)

    async def scenario():
        sink = Sink()
        log = ResponseLog(sink.put_responses)
        for number in range(5):
            log.add(response(number))
        await log.flush()
        return sink

    assert [r.response_id for r in asyncio.run(scenario()).stored] == ["r2", "r3", "r4"]
