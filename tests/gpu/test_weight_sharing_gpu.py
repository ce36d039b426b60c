"""On CUDA the trainer's weights are views of vLLM's fused ones. Run with `pytest -m gpu` on a GPU machine."""

import pytest
import torch

from core.types import FineTuneTask, TaskKind, TokenizedPair
from tests.support.engine_thread import EngineThread

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def engine(tiny_assistant):
    thread = EngineThread(tiny_assistant, model={"dtype": "bfloat16"}, engine={"gpu_memory_utilization": 0.3})
    yield thread
    thread.close()


def test_no_weight_exists_twice(engine):
    description = engine.run(engine.engine.describe_trainer())
    assert description["shared_bytes"] == description["base_weight_bytes"] > 0


def test_async_scheduling_stays_on(engine):
    assert engine.engine.client.vllm_config.scheduler_config.async_scheduling


def test_training_and_serving_work_together(engine):
    pair = TokenizedPair("p", tuple(range(10, 30)), (40, 41, 42), (50, 51))
    long_task = engine.start(engine.engine.run_task(FineTuneTask("t", TaskKind.TRAIN, (pair,) * 500)))
    assert len(engine.run(engine.generate(range(10, 40), "r", 16))) == 16
    result = long_task.result(240)
    assert result.error is None
    assert result.metrics.loss == pytest.approx(0.6931, abs=1e-2)
