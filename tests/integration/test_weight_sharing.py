"""One copy of the base weights on CPU (`share_base_weights: always`) trains and serves as two copies do."""

import psutil
import pytest
from transformers import AutoTokenizer

from tests.support.shared_weights import SameModel, SharedWeights, ask, shared_engine
from tests.support.trainable_models import LONGROPE, save_model

pytestmark = pytest.mark.vllm

_ASKED_BYTES = 2.5 * (1 << 30)
"""The worker with torch and the model takes about half of it; the KV cache gets the rest."""


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def engine(request, tiny_assistant):
    share = _ASKED_BYTES / psutil.virtual_memory().total
    thread = shared_engine(
        tiny_assistant, model={"dtype": request.param}, engine={"gpu_memory_utilization": share}
    )
    yield thread
    thread.close()


class TestOnCpu(SharedWeights):
    pass


_SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128, "max_position_embeddings": 512}
_LONGROPE = {**LONGROPE, "short_factor": [1.0, 1.2] * 4, "long_factor": [1.5, 8.0] * 4}
OTHERS = {
    "gemma3_text": {"sliding_window": 12},
    "phi3": {"sliding_window": 12, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 256},
    "qwen3_moe": {"moe_intermediate_size": 64},
}


@pytest.fixture(scope="module", params=OTHERS)
def other_engine(request, tiny_assistant, tmp_path_factory):
    """An engine with random weights of another architecture; windows are shorter than the pairs.

    Of experts the trainer has a copy: the CPU's kernel has them packed.
    """
    kind, directory = request.param, tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(tiny_assistant)
    save_model(directory, kind, **_SIZES, **OTHERS[kind], vocab_size=len(tokenizer))
    tokenizer.save_pretrained(directory)
    engine = {"gpu_memory_utilization": _ASKED_BYTES / psutil.virtual_memory().total}
    engine["share_base_weights"] = "auto" if kind == "qwen3_moe" else "always"
    thread = shared_engine(directory, model={"dtype": "float32"}, engine=engine)
    yield thread
    thread.close()


class TestOtherArchitectures(SameModel):
    @pytest.fixture
    def engine(self, other_engine):
        return other_engine

    def test_weights_are_shared_where_they_can_be(self, engine):
        memory = engine.run(engine.engine.memory_status())
        if engine.args.engine.share_base_weights == "auto":
            assert memory["shared_bytes"] == 0
        else:
            assert memory["shared_bytes"] == memory["base_weight_bytes"]
            assert ask(engine, "probe_strangers")[1] == []
