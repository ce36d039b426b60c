"""vLLM's KV events: the tree that follows them says what the engine's own prefix cache says."""

import asyncio
import itertools
import random
import stat
import time
from pathlib import Path

import httpx
import pytest

from app.http.app import prefix_names
from app.http.request import RequestChain
from deployments.routing.prefix_index import follow_prefixes
from deployments.routing.prefix_names import HEADER, prefixes_of
from engine.prefix_cache import KvEventStream, kv_events_config, read_prefix_counts
from scheduler.prefixes.tree import PrefixTree
from tests.support.engine_thread import EngineThread

pytestmark = pytest.mark.vllm

BLOCK = 32
request_ids = (f"kv-{i}" for i in itertools.count())


class Follower:
    """A tree that follows an engine's events."""

    def __init__(self, thread):
        self.tree = PrefixTree(BLOCK)
        self.changes = []
        self.stream = KvEventStream.of_engine(thread.engine.client, self._take)
        self._running = thread.start(self.stream.run())

    def _take(self, change):
        self.changes.append(change)
        self.tree.apply(change, time.monotonic())

    def match(self, prompt, namespace=None):
        return self.tree.longest_match(namespace, prompt, time.monotonic())

    def close(self):
        self._running.cancel()


@pytest.fixture(scope="module")
def engine(tiny_assistant):
    events = {"kv_events_config": kv_events_config(), "block_size": BLOCK}
    thread = EngineThread(
        tiny_assistant,
        model={"max_model_len": 512},
        engine={"kv_cache_memory_bytes": 4 << 20, "engine_kwargs": events, "max_num_seqs": 4},
    )
    yield thread
    thread.close()


@pytest.fixture
def follower(engine):
    follower = Follower(engine)
    yield follower
    follower.close()


def ask(engine, prompt, lora=None, max_tokens=4):
    """Answer of the engine, and how many prompt tokens it says were cached."""

    async def generate():
        from engine.vllm.compat import make_sampling_params

        outputs = engine.engine.client.generate(
            {"prompt_token_ids": prompt}, make_sampling_params(max_tokens), next(request_ids), lora_request=lora
        )
        return [output async for output in outputs][-1]

    output = engine.run(generate())
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def prompt_of(seed, length=200):
    return random.Random(seed).choices(range(5, 700), k=length)


def eventually(check, timeout_s=8.0):
    deadline_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline_s, "the events did not arrive"
        time.sleep(0.02)


def test_the_tree_predicts_what_the_engine_finds_in_its_cache(engine, follower):
    prompt = prompt_of(1)
    before = read_prefix_counts()
    answer, cached = ask(engine, prompt, max_tokens=80)
    assert cached == 0
    eventually(lambda: follower.match([*prompt, *answer]) == (200 + 79) // BLOCK * BLOCK)
    for question in (prompt[:100] + [3] * 100, prompt, [4] * 100, [*prompt, *answer[:70]]):
        predicted = follower.match(question)
        assert ask(engine, question)[1] == min(predicted, (len(question) - 1) // BLOCK * BLOCK)
    after = read_prefix_counts()
    assert after.prompt_tokens - before.prompt_tokens == 200 + 200 + 200 + 100 + 270
    assert after.cached_tokens - before.cached_tokens == 0 + 96 + 192 + 0 + 256


def test_adapter_versions_have_namespaces_of_their_own(engine, follower, tmp_path):
    prompt = prompt_of(2)
    engine.run(engine.engine.save_adapter(tmp_path / "v", "test"))
    handle = engine.engine.version_handle("m@v0001", 901, tmp_path / "v")
    engine.run(engine.engine.load_version(handle))
    ask(engine, prompt, handle)
    eventually(lambda: follower.match(prompt, "m@v0001") == 192)
    assert follower.match(prompt) == 0
    assert ask(engine, prompt)[1] == 0
    eventually(lambda: follower.match(prompt) == 192)


def test_evicted_blocks_leave_the_tree(engine, follower):
    capacity_blocks = engine.engine.kv_cache_tokens // BLOCK
    first = prompt_of(3)
    ask(engine, first)
    eventually(lambda: follower.match(first) == 192)
    for seed in range(100, 100 + capacity_blocks // 6 + 2):
        ask(engine, prompt_of(seed), max_tokens=1)
    eventually(lambda: follower.match(first) == 0)
    assert len(follower.tree) <= capacity_blocks
    assert ask(engine, first)[1] == 0


def test_a_reset_cache_clears_the_tree(engine, follower):
    prompt = prompt_of(4)
    ask(engine, prompt)
    eventually(lambda: follower.match(prompt) == 192)
    engine.run(engine.engine.client.reset_prefix_cache())
    ask(engine, prompt_of(5))  # events leave with an iteration
    eventually(lambda: follower.match(prompt) == 0)
    assert follower.match(prompt_of(5)) == 192


def test_one_who_comes_late_learns_the_same(engine, follower):
    prompt = prompt_of(6)
    ask(engine, prompt)
    eventually(lambda: follower.match(prompt) == 192)
    late = Follower(engine)
    try:
        eventually(lambda: late.match(prompt) == 192)
        assert len(late.tree) == len(follower.tree)
        assert late.stream.num_losses == 0
    finally:
        late.close()


def test_an_executor_reports_the_names_of_the_prefixes_in_its_cache(engine):
    body = {
        "model": "mace-tiny",
        "messages": [{"role": "user", "content": "What is the capital of France? " * 22}],
        "max_tokens": 2,
    }
    names = prefixes_of(body)

    async def serve():
        app = await engine.engine.build_openai_app(["mace-tiny"])
        index, stream = follow_prefixes(engine.engine, lambda: None)
        following = asyncio.create_task(stream.run())
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(RequestChain(app, [prefix_names("mace-tiny")], 1 << 20, print)),
            base_url="http://test",
        ) as client:
            headers = {HEADER.decode(): names.to_header().decode()}
            reply = await client.post("/v1/chat/completions", json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        return index, following

    index, following = engine.run(serve())
    assert len(names.digests) == 2
    eventually(lambda: set(engine.run(index.cached_names())) == set(names.digests))
    engine.run(engine.engine.client.reset_prefix_cache())
    ask(engine, prompt_of(7))  # events leave with an iteration
    eventually(lambda: engine.run(index.cached_names()) == [])
    engine.loop.call_soon_threadsafe(following.cancel)


def test_the_sockets_are_closed_to_others(engine):
    config = engine.engine.client.vllm_config.kv_events_config
    for endpoint in (config.endpoint, config.replay_endpoint):
        path = Path(endpoint.removeprefix("ipc://"))
        assert path.is_socket()
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
