"""Pruning makes room when KV blocks are short: fewer preemptions, with training on, and the books balance."""

import asyncio

import pytest

from core.types import FineTuneTask, TaskKind, TokenizedPair
from tests.support.engine_thread import EngineThread, decode
from tests.support.small_llama import prompt_of, save_small_llama

pytestmark = pytest.mark.vllm

NUM_BLOCKS = 96
NUM_REQUESTS = 6


def engine_with(model_dir, start):
    return EngineThread(
        model_dir,
        model={"model_source": str(model_dir), "dtype": "float32"},
        engine={"engine_kwargs": {"num_gpu_blocks_override": NUM_BLOCKS, "block_size": 32}},
        kv_pruning={"start": start, "max_fraction": 0.5, "recent_tokens": 64},
    )


def serve_and_train(engine):
    """All requests at once, a training task beside them; the counters at the end, and the task's error."""
    pair = TokenizedPair("p", tuple(range(10, 30)), (40, 41, 42), (50, 51))
    task = engine.start(engine.engine.run_task(FineTuneTask("t", TaskKind.TRAIN, (pair,) * 8)))

    async def together():
        return await asyncio.gather(*(decode(engine, prompt_of(500, seed), 200) for seed in range(NUM_REQUESTS)))

    answers = engine.run(together())
    assert [len(tokens) for tokens, _, _ in answers] == [200] * NUM_REQUESTS
    result = task.result(240)
    assert result.error is None
    engine.run(decode(engine, prompt_of(40, 99), 2))  # one more iteration, so that the counters are of the end
    return engine.run(engine.engine.memory_status())


@pytest.mark.slow
def test_with_pruning_fewer_requests_are_preempted_and_no_block_is_lost(tmp_path, tiny_assistant):
    save_small_llama(tmp_path, tiny_assistant)
    counters = {}
    for start in ("off", "memory_pressure"):
        engine = engine_with(tmp_path, start)
        try:
            counters[start] = serve_and_train(engine)
        finally:
            engine.close()
    assert counters["off"]["preemptions"] > 0
    assert counters["off"]["pruned_blocks"] == 0
    assert counters["memory_pressure"]["pruned_blocks"] > 0
    assert counters["memory_pressure"]["preemptions"] < counters["off"]["preemptions"]
    for memory in counters.values():
        assert memory["ledger_error"] is None
        assert memory["free_blocks"] >= NUM_BLOCKS - 1 - 3  # the last request's own
