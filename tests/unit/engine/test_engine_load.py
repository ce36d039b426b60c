"""The load of an engine, read from vLLM's own output processor."""

import asyncio
import math
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor

from core.config import AppArgs
from core.types import FineTuneTask, TaskKind, TaskResult
from engine.vllm import engine as engine_module
from engine.vllm.engine import HybridEngine
from tests.support.clock import Clock

TOKEN_BYTES = 2 * 2 * 3 * 16 * 4


@pytest.fixture
def client():
    """The parts of an `AsyncLLM` that a load is read from; the requests are vLLM's own."""
    model = SimpleNamespace(
        get_num_kv_heads=lambda _: 2, get_num_layers=lambda _: 3, get_head_size=lambda: 16, dtype=torch.float32
    )
    cache = SimpleNamespace(kv_cache_size_tokens=1000, cache_dtype="auto")
    config = SimpleNamespace(model_config=model, parallel_config=None, cache_config=cache)
    processor = OutputProcessor(tokenizer=None, log_stats=False)
    return SimpleNamespace(vllm_config=config, output_processor=processor)


def add(client, name, num_tokens, adapter=None):
    lora = None if adapter is None else LoRARequest(adapter, 1, f"/{adapter}")
    params = SamplingParams(max_tokens=4, detokenize=False)
    request = EngineCoreRequest(name, list(range(num_tokens)), None, params, None, 0.0, lora, None, None)
    request.external_req_id = name
    client.output_processor.add_request(request, None)


def answer(client, name):
    client.output_processor.process_outputs([EngineCoreOutput(name, [7])])


def test_waiting_prompts_and_running_requests_are_told_apart(client):
    add(client, "a", 100)
    add(client, "b", 30)
    answer(client, "b")
    load = HybridEngine(client, AppArgs()).load()
    assert (load.waiting_tokens, load.num_running) == (100, 1)
    assert load.kv_bytes_per_token == TOKEN_BYTES
    assert load.kv_capacity_bytes == 1000 * TOKEN_BYTES
    assert load.free_kv_bytes == (1000 - 100 - 30 - 1) * TOKEN_BYTES


def test_a_quantized_cache_holds_four_times_the_tokens_of_a_float32_one(client):
    client.vllm_config.cache_config.cache_dtype = "fp8"
    load = HybridEngine(client, AppArgs()).load()
    assert load.kv_bytes_per_token == TOKEN_BYTES / 4
    assert load.kv_capacity_bytes == 1000 * TOKEN_BYTES / 4


def test_a_waiting_prompt_counts_what_is_not_in_the_prefix_cache_and_at_least_its_last_token(client):
    add(client, "base", 100)
    add(client, "version", 50, adapter="mace-v1")
    add(client, "all cached", 20, adapter="mace-v2")
    add(client, "running", 80)
    answer(client, "running")
    seen = []

    def cached_tokens(adapter, token_ids):
        seen.append((adapter, len(token_ids)))
        return {None: 64, "mace-v1": 0, "mace-v2": 20}[adapter]

    load = HybridEngine(client, AppArgs()).load(cached_tokens)
    assert load.waiting_tokens == (100 - 64) + 50 + 1
    assert seen == [(None, 100), ("mace-v1", 50), ("mace-v2", 20)]  # a running request's prompt is not looked up
    assert load.free_kv_bytes == HybridEngine(client, AppArgs()).load().free_kv_bytes


def test_in_a_very_long_queue_only_the_first_prompts_are_looked_up(client, monkeypatch):
    monkeypatch.setattr(engine_module, "_MAX_LOOKUPS", 3)
    for number in range(5):
        add(client, f"r{number}", 10)
    assert HybridEngine(client, AppArgs()).load(lambda *_: 8).waiting_tokens == 3 * 2 + 2 * 10


def test_a_reading_of_the_free_memory_does_not_count_for_ever(client, monkeypatch):
    """Only tasks read it, and with too little no task comes: a low reading would keep training away for good."""
    clock = Clock(50.0)
    monkeypatch.setattr(engine_module.time, "monotonic", clock)
    engine = HybridEngine(client, AppArgs())
    assert engine.free_memory_bytes == math.inf
    client.generate = answer_with(TaskResult("t", TaskKind.TRAIN, error="no", free_bytes=0))
    asyncio.run(engine.run_task(FineTuneTask("t", TaskKind.TRAIN, ())))
    assert engine.free_memory_bytes == 0
    clock.now_s += 59
    client.generate = answer_with(TaskResult("t", TaskKind.TRAIN, error="malformed"))
    asyncio.run(engine.run_task(FineTuneTask("t", TaskKind.TRAIN, ())))
    assert engine.free_memory_bytes == 0, "a task after which nobody looked says nothing"
    clock.now_s += 1
    assert engine.free_memory_bytes == math.inf


def answer_with(result):
    async def generate(prompt, params, request_id):
        yield SimpleNamespace(kv_transfer_params=result.to_wire())

    return generate
