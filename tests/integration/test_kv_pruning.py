"""KV pruning in a real vLLM engine: the same log-probabilities as a Hugging Face cache with those entries removed."""

import asyncio

import pytest

from core.config import KvPruningConfig
from tests.support.engine_thread import EngineThread, decode
from tests.support.pruned_reference import PrunedReference
from tests.support.small_llama import prompt_of, save_small_llama, save_small_mistral

pytestmark = pytest.mark.vllm

BLOCK_TOKENS = 32
NUM_BLOCKS = 96


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("small-llama")


@pytest.fixture(scope="module")
def model(model_dir, tiny_assistant):
    return save_small_llama(model_dir, tiny_assistant)


@pytest.fixture(scope="module")
def engine(model_dir, model):
    pruning = {"start": "always", "max_fraction": 0.25, "recent_tokens": 64}
    thread = EngineThread(
        model_dir,
        model={"model_source": str(model_dir), "dtype": "float32"},
        engine={"engine_kwargs": {"num_gpu_blocks_override": NUM_BLOCKS}},
        kv_pruning=pruning,
        training={"enabled": False},
    )
    yield thread
    thread.close()


def memory_of(engine):
    return engine.run(engine.engine.memory_status())


def expected(engine, model, prompt, num_tokens):
    config = engine.args.kv_pruning
    reference = PrunedReference(model, config, BLOCK_TOKENS)
    tokens, log_probs = reference.decode(prompt, num_tokens)
    return tokens, [float(row[token]) for row, token in zip(log_probs, tokens, strict=True)], reference.dropped


def test_a_pruned_request_answers_as_a_cache_without_those_entries(engine, model):
    assert engine.run(engine.engine.pruning_refusal()) is None
    prompt, before = prompt_of(700, 0), memory_of(engine)
    tokens, log_probs, dropped = expected(engine, model, prompt, 80)
    full_tokens, full_log_probs, _ = expected_in_full(model, prompt, 80)
    got_tokens, got, _ = engine.run(decode(engine, prompt, 80))
    assert len(dropped) >= 5
    assert got_tokens == tokens
    assert got == pytest.approx(log_probs, abs=1e-4)
    assert full_tokens != tokens or full_log_probs != pytest.approx(log_probs, abs=1e-2), "nothing was pruned away"
    assert memory_of(engine)["pruned_blocks"] - before["pruned_blocks"] == len(dropped)


def expected_in_full(model, prompt, num_tokens):
    config = KvPruningConfig(max_fraction=1e-9)
    reference = PrunedReference(model, config, BLOCK_TOKENS)
    tokens, log_probs = reference.decode(prompt, num_tokens)
    return tokens, [float(row[token]) for row, token in zip(log_probs, tokens, strict=True)], reference.dropped


def test_pruned_and_other_requests_in_one_batch_do_not_touch_each_other(engine, model):
    prompts = [prompt_of(n, 10 + n) for n in (700, 40, 333, 512)]
    wanted = [expected(engine, model, prompt, 50)[1] for prompt in prompts]

    async def together():
        return await asyncio.gather(*(decode(engine, prompt, 50) for prompt in prompts))

    for (_, got, _), log_probs in zip(engine.run(together()), wanted, strict=True):
        assert got == pytest.approx(log_probs, abs=1e-4)


def test_a_request_that_opts_out_keeps_every_block(engine, model):
    prompt, before = prompt_of(640, 3), memory_of(engine)
    _, log_probs, _ = expected_in_full(model, prompt, 40)
    _, got, _ = engine.run(decode(engine, prompt, 40, kv_pruning=False))
    assert got == pytest.approx(log_probs, abs=1e-4)
    assert memory_of(engine)["pruned_blocks"] == before["pruned_blocks"]


def test_a_preempted_request_is_computed_anew_in_full_and_pruned_again(engine, model):
    # At their end they hold 34 blocks each, three quarters of them after pruning: 5 * 26 of 95.
    prompts = [prompt_of(780, 40 + n) for n in range(5)]
    before = memory_of(engine)

    async def together():
        return await asyncio.gather(*(decode(engine, prompt, 300) for prompt in prompts))

    for prompt, (tokens, log_probs, _) in zip(prompts, engine.run(together()), strict=True):
        wanted_tokens, wanted, _ = expected(engine, model, prompt, 40)
        assert tokens[:40] == wanted_tokens  # no request is preempted so early
        assert log_probs[:40] == pytest.approx(wanted, abs=1e-4)
        assert len(tokens) == 300
    after = memory_of(engine)
    preempted = after["preemptions"] - before["preemptions"]
    assert preempted > 0
    assert after["pruned_requests"] - before["pruned_requests"] == len(prompts) + preempted


def test_what_a_pruned_request_computed_is_never_found_by_another(engine, model):
    prompt = prompt_of(700, 77)
    tokens, _, _ = engine.run(decode(engine, prompt, 80))
    longer = [*prompt, *tokens]
    _, log_probs, _ = expected(engine, model, longer, 20)
    _, got, num_cached = engine.run(decode(engine, longer, 20))
    # Only what stood before the first dropped block is found; it was computed in full.
    assert num_cached < len(prompt)
    assert got == pytest.approx(log_probs, abs=1e-4)


def test_every_block_is_free_again_when_nothing_runs(engine):
    engine.run(decode(engine, prompt_of(40, 5), 2))
    memory = memory_of(engine)
    assert memory["ledger_error"] is None
    assert memory["num_blocks"] == NUM_BLOCKS - 1
    assert memory["free_blocks"] >= memory["num_blocks"] - 3  # the last iteration's own request


def test_a_model_with_a_sliding_window_is_served_without_pruning(tmp_path, tiny_assistant):
    save_small_mistral(tmp_path, tiny_assistant, window=256)
    thread = EngineThread(
        tmp_path,
        model={"model_source": str(tmp_path), "dtype": "float32"},
        kv_pruning={"start": "always", "max_fraction": 0.25, "recent_tokens": 64},
        training={"enabled": False},
    )
    try:
        assert "full attention" in thread.run(thread.engine.pruning_refusal())
        tokens, _, _ = thread.run(decode(thread, prompt_of(700, 0), 8))
        assert len(tokens) == 8
        memory = memory_of(thread)
        assert memory["pruned_blocks"] == 0
        assert memory["heap_used_bytes"] > 10 << 20  # torch alone has more
    finally:
        thread.close()
