"""The count of requests that the worker reads while EngineCore waits for it."""

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from engine.vllm.arrivals import ArrivalCount, count_arrivals, offer_count
from engine.vllm.directive import NOTE_KEY, TASK_KEY


def request(priority=0, extra=None, has_params=True):
    params = SimpleNamespace(extra_args=extra) if has_params else None
    return SimpleNamespace(priority=priority, sampling_params=params)


@pytest.fixture
def sent():
    return []


@pytest.fixture
def send(sent):
    async def add_request_async(one):
        sent.append(one)

    client = SimpleNamespace(engine_core=SimpleNamespace(add_request_async=add_request_async))
    offer_count()
    count_arrivals(client)
    return lambda one: asyncio.run(client.engine_core.add_request_async(one))


def test_interactive_requests_are_counted_and_everything_is_sent(send, sent):
    count = ArrivalCount()
    everything = [request(), request(extra={"x": 1}), request(has_params=False), request(priority=1)]
    everything += [request(extra={TASK_KEY: {}}), request(extra={NOTE_KEY: {}})]
    for one in everything:
        send(one)
    assert sent == everything
    assert count.read() == 3


def test_another_process_reads_the_count_by_the_environment(send):
    send(request())
    send(request())
    code = "from engine.vllm.arrivals import ArrivalCount; print(ArrivalCount().read())"
    reader = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert reader.stdout.strip() == "2"


def test_without_a_count_nobody_waits_and_nothing_fails(monkeypatch):
    monkeypatch.setenv("MACE_ARRIVALS", f"/proc/{os.getpid()}/fd/999999")
    assert ArrivalCount().read() == 0
    monkeypatch.delenv("MACE_ARRIVALS")
    assert ArrivalCount().read() == 0
