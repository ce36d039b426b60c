"""Publishing on a real engine: nobody reads another version's keys, and what prompts share is there beforehand."""

import asyncio
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
from vllm import SamplingParams

from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.registry import AdapterRegistry
from core.config import TrainingConfig
from core.types import FineTuneTask, TaskKind
from core.wire import TrainingPair
from deployments.publishing.versions import AdapterVersions, Published
from engine.tiny.knowledge import Style, preference_questions, render
from engine.training.pair_tokens import PairTokenizer
from tests.support.engine_thread import EngineThread

pytestmark = pytest.mark.vllm

BLOCK = 32
NUM_TOKENS = 8
ENGINE = {"engine_kwargs": {"block_size": BLOCK}}
SYSTEM = [17 + 5 * i % 500 for i in range(150)]
"""Four whole blocks, and a bit."""
QUESTIONS = [[300 + 7 * number % 300 for _ in range(20 + number)] for number in range(4)]
request_ids = (f"publish-{i}" for i in itertools.count())


@dataclass
class Answer:
    """What a request got, and whose it was."""

    version: str
    handle: Any
    prompt: list[int]
    token_ids: list[int]
    logprobs: list[dict[int, float]]
    num_cached: int


async def ask(engine, handle, prompt, num_tokens=NUM_TOKENS):
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=5, detokenize=False)
    request = {"prompt_token_ids": prompt}
    async for output in engine.client.generate(request, params, next(request_ids), lora_request=handle):
        last = output
    [completion] = last.outputs
    logprobs = [{token: value.logprob for token, value in step.items()} for step in completion.logprobs]
    name = handle.lora_name if handle is not None else "base"
    return Answer(name, handle, prompt, list(completion.token_ids), logprobs, last.num_cached_tokens)


async def ask_all(engine, handle, num_tokens=NUM_TOKENS):
    return await asyncio.gather(*[ask(engine, handle, SYSTEM + q, num_tokens) for q in QUESTIONS])


async def train_version(engine, registry, pairs):
    for _ in range(8):
        result = await engine.run_task(FineTuneTask("t", TaskKind.TRAIN, pairs))
        assert result.error is None
    staging = registry.begin()
    await engine.save_adapter(staging, "b")
    return registry.commit(staging, AdapterManifest(base_model="b", status="published", reason="test"))


async def watched_prompts(engine, handle):
    """Prompts that an observer sees of users and of others, by adapter name."""
    seen = []
    engine.watch_prompts(lambda name, ids: seen.append((name, list(ids))))

    def broken(name, ids):
        raise RuntimeError("an observer must not cost a request")

    engine.watch_prompts(broken)
    await ask(engine, None, [1, 2, 3])
    await ask(engine, handle, [4, 5, 6])
    await engine.generate(handle, [[7, 8]], 1)
    salted = {"prompt_token_ids": [9, 9], "cache_salt": "mine"}
    twins = {"prompt_token_ids": [10, 11]}
    for prompt, count in ((salted, 1), (twins, 2)):
        params = SamplingParams(max_tokens=1, n=count, detokenize=False)
        _ = [output async for output in engine.client.generate(prompt, params, next(request_ids))]
    return seen


async def publish_mid_traffic(engine, registry, pairs):
    """Answers by phase. `first` and `second` are published in turn; the base is asked all the time."""
    versions = AdapterVersions(engine, registry, "m")
    await versions.attach({})
    seen = {"cold base": [await ask(engine, None, [*SYSTEM, 5, 6, 7])]}
    first = await train_version(engine, registry, pairs)
    assert await versions.publish(first) is Published.LIVE
    one = versions.live_handle
    seen["before"] = [*await ask_all(engine, one), *await ask_all(engine, None)]
    second = await train_version(engine, registry, pairs)
    in_flight = [asyncio.create_task(ask_all(engine, handle, 150)) for handle in (one, None)]
    await asyncio.sleep(0.1)
    assert await versions.publish(second) is Published.LIVE
    two = versions.live_handle
    assert not any(task.done() for task in in_flight)
    seen["first after"] = [await ask(engine, two, [*SYSTEM, *range(40, 60)])]  # a question of its own
    after = await asyncio.gather(*(ask_all(engine, handle) for handle in (two, one, None)))
    seen["after"] = [answer for answers in after for answer in answers]
    seen["during"] = [answer for task in in_flight for answer in await task]
    return versions.last_publish, seen, await watched_prompts(engine, two)


@pytest.fixture(scope="module")
def published(tiny_assistant, tmp_path_factory):
    tokenizer = PairTokenizer.load(str(tiny_assistant), TrainingConfig())
    pairs = tuple(
        tokenizer.tokenize(
            TrainingPair(
                f"pair-{i}",
                [{"role": "user", "content": question.text}],
                render(question, Style.POLITE),
                render(question, Style.TERSE),
            )
        )
        for i, question in enumerate(preference_questions()[:8])
    )
    registry = AdapterRegistry.open(tmp_path_factory.mktemp("adapters"), "b")
    thread = EngineThread(tiny_assistant, engine=ENGINE, training={"learning_rate": 1e-3})
    try:
        return thread.run(publish_mid_traffic(thread.engine, registry, pairs))
    finally:
        thread.close()


@pytest.fixture(scope="module")
def cold(published, tiny_assistant):
    """The same questions to an engine without a prefix cache, one at a time; by version and prompt."""
    _, seen, _ = published
    off = {"engine_kwargs": {"block_size": BLOCK, "enable_prefix_caching": False}}
    thread = EngineThread(tiny_assistant, engine=off, training={"enabled": False})
    try:
        longest = {}
        for answer in itertools.chain.from_iterable(seen.values()):
            key = (answer.version, tuple(answer.prompt))
            if key not in longest or len(answer.token_ids) > len(longest[key].token_ids):
                longest[key] = answer
        return {
            key: thread.run(ask(thread.engine, a.handle, a.prompt, len(a.token_ids))) for key, a in longest.items()
        }
    finally:
        thread.close()


@pytest.mark.parametrize("phase", ["cold base", "before", "during", "first after", "after"])
def test_every_request_answers_like_a_cold_engine_of_its_own_version(published, cold, phase):
    answers = published[1][phase]
    assert answers
    for answer in answers:
        reference = cold[answer.version, tuple(answer.prompt)]
        assert reference.num_cached == 0
        assert answer.token_ids == reference.token_ids[: len(answer.token_ids)]
        for ours, theirs in zip(answer.logprobs, reference.logprobs, strict=False):
            for token in ours.keys() & theirs.keys():
                assert ours[token] == pytest.approx(theirs[token], abs=1e-4)


def test_the_versions_differ_enough_to_tell_their_keys_apart(cold):
    for question in QUESTIONS:
        prompt = tuple(SYSTEM + question)
        first = {version: cold[version, prompt].logprobs[0] for version in ("base", "m@v0001", "m@v0002")}
        for one, other in itertools.combinations(first.values(), 2):
            assert max(abs(one[token] - other[token]) for token in one.keys() & other.keys()) > 0.01


def test_the_first_request_on_a_new_version_finds_the_system_prompt_computed(published):
    timing, seen, _ = published
    [first] = seen["first after"]
    assert first.version == "m@v0002"
    assert first.num_cached == len(SYSTEM) // BLOCK * BLOCK
    assert timing.warmed_prefixes >= 1
    assert timing.warmed_tokens >= first.num_cached
    assert timing.warm_error is None


def test_the_base_and_the_old_version_keep_their_cache(published):
    _, seen, _ = published
    assert seen["cold base"][0].num_cached == 0
    for version in ("base", "m@v0001"):
        before = [answer for answer in seen["before"] if answer.version == version]
        after = [answer for answer in seen["after"] if answer.version == version]
        assert len(before) == len(after) == len(QUESTIONS)
        for early, late in zip(before, after, strict=True):
            assert late.num_cached == (len(late.prompt) - 1) // BLOCK * BLOCK  # all that can be
            assert late.num_cached >= early.num_cached


def test_an_observer_sees_the_prompts_of_users_only_and_each_once(published):
    *_, watched = published
    assert watched == [(None, [1, 2, 3]), ("m@v0002", [4, 5, 6]), (None, [10, 11])]
