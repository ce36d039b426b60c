"""Two executors, each with an engine, behind one HTTP proxy: requests go where their prefix is cached."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.harness.models import vocab_size
from benchmarks.harness.server import ServerProcess
from deployments.routing.router import REPORT_PERIOD_S
from tests.support.small_llama import save_small_llama

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow]

NUM_GROUPS, NUM_ROUNDS = 8, 4
SLOW = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
"""A prompt takes far longer than a busy machine's noise: the executor that has it cached is the better one by far."""
WORDS = ["river", "stone", "lamp", "cloud", "apple", "paper", "window", "garden", "silver", "morning"]


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_assistant):
    directory = tmp_path_factory.mktemp("two")
    save_small_llama(directory / "model", tiny_assistant, vocab_size=vocab_size(tiny_assistant), **SLOW)
    server = ServerProcess(
        directory,
        Path(__file__).parents[2] / "serve_config.tiny.yaml",
        deployments=[{"name": "Executor", "num_replicas": 2}],
        sections={
            "model": {"model_id": "small", "model_source": str(directory / "model")},
            "engine": {"frontend_kwargs": {"enable_prompt_tokens_details": True}},
            "training": {"enabled": False},
        },
    )
    with server.running():
        yield server


def system_prompts():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=480)) for _ in range(NUM_GROUPS)]


def ask(server, system, question):
    """Prompt tokens, and how many of them the executor had in its cache."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    reply = server.call(
        "POST", "/v1/chat/completions", json={"model": "small", "max_tokens": 2, "messages": messages}
    )
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    return usage["prompt_tokens"], (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0


def prompt_tokens_by_executor(server):
    found = {}
    deadline_s = time.monotonic() + 60
    while len(found) < 2:
        assert time.monotonic() < deadline_s, f"only {sorted(found)} answered"
        with ThreadPoolExecutor(8) as pool:  # at once, so that load spreads them
            for status in pool.map(lambda _: server.call("GET", "/v1/training").json()["executor"], range(16)):
                found[status["executor_id"]] = status["prefix_cache"]["prompt_tokens"]
    return found


def test_every_conversation_stays_where_its_prefix_is_cached(server):
    prompts = system_prompts()
    assert len(prompt_tokens_by_executor(server)) == 2
    with ThreadPoolExecutor(NUM_GROUPS) as pool:  # the first of each at once: load spreads them over both
        first = list(pool.map(lambda system: ask(server, system, "question 0"), prompts))
    time.sleep(3 * REPORT_PERIOD_S)
    later = [ask(server, system, f"question {turn}") for turn in range(1, NUM_ROUNDS) for system in prompts]
    assert all(cached < tokens / 2 for tokens, cached in first)
    hits = [cached > tokens / 2 for tokens, cached in later]
    # Chance gives 17. One may come while the report says that its home is at work on something long.
    assert sum(hits) >= len(hits) - 2, later
    time.sleep(3 * REPORT_PERIOD_S)
    assert all(tokens > 0 for tokens in prompt_tokens_by_executor(server).values())
