"""KV pruning on CUDA: FlashAttention, piecewise graphs, async scheduling. Run with `pytest -m gpu` on a GPU machine."""

import pytest
import torch

from tests.support.engine_thread import EngineThread, decode
from tests.support.pruned_reference import PrunedReference
from tests.support.small_llama import prompt_of, save_small_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BLOCK_TOKENS = 16


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("small-llama")


@pytest.fixture(scope="module")
def model(model_dir, tiny_assistant):
    return save_small_llama(model_dir, tiny_assistant)


@pytest.fixture(scope="module")
def engine(model_dir, model):
    thread = EngineThread(
        model_dir,
        model={"model_source": str(model_dir), "dtype": "bfloat16"},
        engine={"gpu_memory_utilization": 0.3, "engine_kwargs": {"block_size": BLOCK_TOKENS}},
        kv_pruning={"start": "always", "max_fraction": 0.25, "recent_tokens": 64},
        training={"enabled": False},
    )
    yield thread
    thread.close()


def test_a_pruned_request_answers_as_a_cache_without_those_entries(engine, model):
    """In bfloat16, so only while both choose the same tokens, and only as near as bfloat16 is.

    With two iterations in flight blocks go one token later than on the CPU, so the first pruned token may differ.
    """
    prompt = prompt_of(700, 0)
    reference = PrunedReference(model.to(torch.bfloat16), engine.args.kv_pruning, BLOCK_TOKENS)
    wanted_tokens, rows = reference.decode(prompt, 40)
    tokens, got, _ = engine.run(decode(engine, prompt, 40))
    same = next((i for i, (a, b) in enumerate(zip(tokens, wanted_tokens, strict=True)) if a != b), len(tokens))
    assert same >= 8
    wanted = [float(rows[i][token]) for i, token in enumerate(tokens[:same])]
    assert got[2:same] == pytest.approx(wanted[2:], abs=0.1)
    assert engine.run(engine.engine.memory_status())["pruned_blocks"] > 0
