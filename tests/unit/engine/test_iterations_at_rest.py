"""Readings of the worker's iterations: none goes to the worker while an engine is at rest, and none is lost."""

import asyncio

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor

from core.batch import ForwardShape, IterationSample
from core.config import AppArgs
from engine.vllm.engine import HybridEngine
from engine.vllm.iteration_log import IterationLog


class Client:
    """The parts of an `AsyncLLM` that a reading touches; the worker's log is the real one."""

    def __init__(self):
        self.output_processor = OutputProcessor(tokenizer=None, log_stats=False)
        self.log = IterationLog()
        self.num_questions = 0
        self.meanwhile = lambda: None

    async def collective_rpc(self, method, args):
        self.num_questions += 1
        reply = self.log.since(args[1])
        self.meanwhile()
        return [{"value": reply}]

    def begin(self, name):
        params = SamplingParams(max_tokens=4, detokenize=False)
        request = EngineCoreRequest(name, [1, 2], None, params, None, 0.0, None, None, None)
        request.external_req_id = name
        self.output_processor.add_request(request, None)

    def iterate(self):
        self.log.add(IterationSample(ForwardShape(), 0.5))

    def end(self, name):
        self.iterate()
        self.output_processor.process_outputs([EngineCoreOutput(name, [7], finish_reason=FinishReason.STOP)])


class Reader:
    def __init__(self):
        self.client = Client()
        self.engine = HybridEngine(self.client, AppArgs())
        self.after = 0

    def read(self):
        """How many new iterations there were."""
        self.after, samples = asyncio.run(self.engine.iterations(self.after))
        return len(samples)


@pytest.fixture
def reader():
    return Reader()


def test_an_engine_at_rest_is_asked_once(reader):
    assert [reader.read() for _ in range(5)] == [0] * 5
    assert reader.client.num_questions == 1


def test_the_last_iterations_of_a_burst_are_read_once(reader):
    reader.read()
    reader.client.begin("a")
    reader.client.iterate()
    assert [reader.read(), reader.read()] == [1, 0]
    reader.client.end("a")
    assert [reader.read(), reader.read(), reader.read()] == [1, 0, 0]
    assert reader.client.num_questions == 4


def test_a_burst_between_two_readings_is_read(reader):
    reader.read()
    reader.client.begin("a")
    reader.client.end("a")
    assert [reader.read(), reader.read()] == [1, 0]
    assert reader.client.num_questions == 2


def test_a_request_that_comes_while_the_worker_answers_is_not_overlooked(reader):
    def burst():
        reader.client.begin("a")
        reader.client.end("a")
        reader.client.meanwhile = lambda: None

    reader.client.meanwhile = burst
    assert [reader.read(), reader.read(), reader.read()] == [0, 1, 0]


def test_who_has_read_less_gets_what_is_missing(reader):
    reader.client.begin("a")
    reader.client.end("a")
    assert reader.read() == 1
    other = Reader()
    other.engine = reader.engine
    assert other.read() == 1
    assert reader.read() == 0
