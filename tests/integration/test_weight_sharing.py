"""One copy of the base weights on CPU (`share_base_weights: always`) trains and serves as two copies do."""

import pytest

from core.config import TrainingConfig
from core.types import FineTuneTask, TaskKind
from core.wire import TrainingPair
from engine.training.pair_tokens import PairTokenizer
from tests.support.engine_thread import EngineThread

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(tiny_assistant):
    thread = EngineThread(tiny_assistant, engine={"share_base_weights": "always"})
    yield thread
    thread.close()


def test_every_base_weight_of_the_trainer_is_vllms(engine):
    description = engine.run(engine.engine.describe_trainer())
    assert description["base_weight_bytes"] > 1_000_000
    assert description["shared_bytes"] == description["base_weight_bytes"]


def test_training_on_shared_weights_leaves_inference_unchanged(engine, tiny_assistant):
    tokenizer = PairTokenizer.load(str(tiny_assistant), TrainingConfig())
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    pair = tokenizer.tokenize(TrainingPair("p", prompt, "Certainly! Paris.", "It is Paris."))
    before = engine.run(engine.generate(pair.prompt_ids, "before", 16))
    results = [
        engine.run(engine.engine.run_task(FineTuneTask(f"t{i}", TaskKind.TRAIN, (pair,) * 4))) for i in range(3)
    ]
    assert [result.error for result in results] == [None] * 3
    assert results[0].metrics.loss == pytest.approx(0.6931, abs=1e-3)
    assert results[2].metrics.loss < results[0].metrics.loss
    engine.run(engine.engine.client.reset_prefix_cache())
    assert engine.run(engine.generate(pair.prompt_ids, "after", 16)) == before
