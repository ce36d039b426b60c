"""A request on which the engine fails is ended, and everybody else goes on as if it had not been there."""

import asyncio

import httpx
import pytest
from vllm.exceptions import GenerationError

from app.http.request import RequestChain
from core.config import TrainingConfig
from core.errors import EngineUnavailableError
from core.types import FineTuneTask, TaskKind
from core.wire import TrainingPair
from engine.tiny.knowledge import Style, preference_questions, render
from engine.training.pair_tokens import PairTokenizer
from engine.vllm.requests import FAILED
from tests.support.engine_thread import EngineThread
from tests.support.faulty_worker import DECODE, EVERYBODY, FAULTY_TOP_P, ONCE, PREFILL, PREPARE, SAMPLING

pytestmark = pytest.mark.vllm

SHARED = [100 + i % 50 for i in range(150)]
"""More than a block of the prefix cache."""
PROMPTS = [[60 + number, *range(200, 210 + 7 * number)] for number in range(5)] + [
    [*SHARED, 300 + number] for number in range(3)
]
NUM_TOKENS = 24


def faulty_engine(directory):
    kwargs = {
        "worker_cls": "tests.support.faulty_worker.FaultyWorker",
        "logits_processors": ["tests.support.faulty_worker:FaultyProcessor"],
    }
    engine = {"engine_kwargs": kwargs, "max_num_batched_tokens": 256}
    return EngineThread(
        directory,
        model={"dtype": "float32"},
        training={"learning_rate": 1e-3, "max_slice_tokens": 16},
        engine=engine,
    )


@pytest.fixture(scope="module")
def engine(tiny_assistant):
    thread = faulty_engine(tiny_assistant)
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def right(engine):
    """Answers to all prompts when nothing fails."""
    return engine.run(answers(engine, PROMPTS))


async def answers(engine, prompts, delay_s=0.0):
    async def one(number, prompt):
        await asyncio.sleep(delay_s * number)
        try:
            return await engine.generate(prompt, f"request-{id(prompts)}-{number}", NUM_TOKENS)
        except GenerationError as error:
            return str(error)

    return await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))


@pytest.mark.parametrize(
    "fault", [PREPARE, PREFILL, DECODE, SAMPLING], ids=["preparation", "prefill", "decode", "sampling"]
)
@pytest.mark.parametrize("delay_s", [0.0, 0.02], ids=["together", "one after another"])
def test_only_the_culprit_ends_and_the_others_get_the_same_tokens(engine, right, fault, delay_s):
    before = engine.engine.num_failed_requests
    prompts = [*PROMPTS[:3], [fault, *SHARED], *PROMPTS[3:]]
    got = engine.run(answers(engine, prompts, delay_s))
    assert got.pop(3) == FAILED
    assert got == right
    assert engine.engine.num_failed_requests == before + 1
    assert engine.engine.last_failed_request == f"request-{id(prompts)}-3"


def test_two_culprits_of_two_kinds_end_and_nobody_else(engine, right):
    prompts = [[DECODE, 5], *PROMPTS, [SAMPLING, *SHARED]]
    got = engine.run(answers(engine, prompts))
    assert (got[0], got[-1]) == (FAILED, FAILED)
    assert got[1:-1] == right


@pytest.mark.parametrize("fault", [PREPARE, PREFILL, DECODE, SAMPLING])
def test_a_culprit_that_is_alone_in_the_engine_ends_too(engine, right, fault):
    for _ in range(4):
        assert engine.run(answers(engine, [[fault, 5, 6]])) == [FAILED]
    assert engine.run(answers(engine, PROMPTS)) == right


def test_a_failure_that_does_not_come_back_costs_nobody(engine, right):
    got = engine.run(answers(engine, [[ONCE, 5], *PROMPTS]))
    assert FAILED not in got
    assert got[1:] == right


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "tiny", "prompt": "Hello", "max_tokens": 8},
    "/v1/responses": {"model": "tiny", "input": "Hello", "max_output_tokens": 32},
    "/v1/messages": CHAT,
}


@pytest.fixture(scope="module")
def app(engine):
    return engine.run(engine.engine.build_openai_app(["tiny"]))


def post(engine, app, path, **changes):
    async def send():
        chain = RequestChain(app, [], 1_000_000, lambda _: None)
        transport = httpx.ASGITransport(chain, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json={**BODIES[path], **changes}, timeout=60)

    return engine.run(send())


@pytest.mark.parametrize("path", BODIES)
def test_the_client_is_told_on_each_route(engine, app, path):
    assert post(engine, app, path).status_code == 200
    whole = post(engine, app, path, top_p=FAULTY_TOP_P, temperature=1.0)
    assert whole.status_code == 500
    assert whole.json()["error"]["message"] == FAILED
    stream = post(engine, app, path, top_p=FAULTY_TOP_P, temperature=1.0, stream=True)
    last_event = stream.text.strip().split("\n\n")[-1]
    if path in ("/v1/responses", "/v1/messages"):  # vLLM fails on its own error: the stream ends with another one
        assert last_event.startswith("event: error\ndata: {")
    else:
        assert FAILED in stream.text
    assert post(engine, app, path).status_code == 200


def test_training_goes_on_to_the_same_bits(engine, tiny_assistant, tmp_path):
    tokenizer = PairTokenizer.load(str(tiny_assistant), TrainingConfig())
    pairs = tuple(
        tokenizer.tokenize(
            TrainingPair(
                str(number),
                [{"role": "user", "content": question.text}],
                render(question, Style.POLITE),
                render(question, Style.TERSE),
            )
        )
        for number, question in enumerate(preference_questions()[:8])
    )

    def trained(name, prompts):
        engine.run(engine.engine.load_adapter(None))
        task = engine.start(engine.engine.run_task(FineTuneTask(name, TaskKind.TRAIN, pairs)))
        got = engine.run(answers(engine, prompts))
        assert task.result(120).error is None
        engine.run(engine.engine.save_adapter(tmp_path / name, "tiny"))
        return got, (tmp_path / name / "adapter_model.safetensors").read_bytes()

    _, quiet = trained("quiet", PROMPTS)
    got, disturbed = trained("disturbed", [[SAMPLING, 5], *PROMPTS, [DECODE, 5]])
    assert (got[0], got[-1]) == (FAILED, FAILED)
    assert disturbed == quiet


def test_a_device_that_fails_for_everybody_ends_the_engine(tiny_assistant):
    thread = faulty_engine(tiny_assistant)
    try:
        with pytest.raises(EngineUnavailableError):
            thread.run(answers(thread, [*PROMPTS[:2], [EVERYBODY, 5]]))
        assert thread.engine.num_failed_requests == 0
    finally:
        thread.close()
