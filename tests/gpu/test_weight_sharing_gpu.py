"""On CUDA the trainer's weights are views of vLLM's fused ones, in the number format that the default settings give.

Run with `pytest -m gpu` on a GPU machine. `tests/integration/test_weight_sharing.py` is the same on CPU.
"""

import pytest
import torch

from tests.support.shared_weights import SharedWeights, shared_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def engine(tiny_assistant):
    thread = shared_engine(tiny_assistant, engine={"gpu_memory_utilization": 0.3, "share_base_weights": "auto"})
    yield thread
    thread.close()


class TestOnCuda(SharedWeights):
    def test_async_scheduling_and_the_newer_runner_stay_on(self, engine):
        config = engine.engine.client.vllm_config
        assert config.scheduler_config.async_scheduling
        assert config.use_v2_model_runner
