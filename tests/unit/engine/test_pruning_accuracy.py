"""Passages out of data sets, and the sums behind `mace profile pruning`."""

import random

import pytest
from transformers import AutoModelForCausalLM

from core.config import ModelConfig
from core.errors import AdapterError, ConfigError, ProfileError
from engine.pruning.accuracy import PruningMeasurement, loaded_model, measure
from engine.pruning.passages import generated_passages, reply_passages, text_passages
from engine.pruning.reader import PrunedReader
from engine.pruning.tasks import make_recall
from engine.tiny.tokenizer import VOCAB_SIZE, train_tokenizer
from tests.support.trainable_models import save_model

PLAN = {"block_tokens": 16, "sink_tokens": 16, "recent_tokens": 32}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model with the built-in model's tokenizer, which has a chat template."""
    path = tmp_path_factory.mktemp("model")
    save_model(path, "llama", vocab_size=VOCAB_SIZE, max_position_embeddings=1024, num_hidden_layers=2)
    train_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reader(directory):
    return PrunedReader(AutoModelForCausalLM.from_pretrained(directory).eval(), train_tokenizer(), **PLAN)


def test_short_texts_are_joined_and_long_ones_cut(reader):
    rows = [
        {"text": "one two three " * 10},
        {"text": ""},
        {"text": "four five six " * 200},
        {"text": "seven " * 5},
    ]
    made = list(text_passages(reader, rows, "text", 5, 100, 20))
    assert len(made) == 1
    context, continuation = made[0]
    assert (len(context), len(continuation)) == (100, 20)
    joined = reader.encode("one two three " * 10 + "\n\n" + "four five six " * 200)
    assert context + continuation == joined[:120]


def test_no_more_passages_than_asked_for_are_read(reader):
    def rows():
        for _ in range(3):
            yield {"text": "word " * 300}
        raise AssertionError("read on")

    assert len(list(text_passages(reader, rows(), "text", 3, 100, 20))) == 3


def test_prompts_go_through_the_chat_template_and_long_ones_are_left_out(reader):
    rows = [
        {"q": "Hello there", "a": "Good day to you"},
        {"q": [{"role": "user", "content": "Hello"}], "a": "Yes"},
        {"q": "many words " * 100, "a": "No"},
    ]
    made = list(reply_passages(reader, rows, "q", "a", 5, 50, 3))
    assert [context for context, _ in made] == [
        reader.encode("<|user|>Hello there<|end|><|assistant|>"),
        reader.encode("<|user|>Hello<|end|><|assistant|>"),
    ]
    assert made[0][1] == reader.encode("Good day to you")[:3]


@pytest.mark.parametrize(
    ("rows", "error", "said"),
    [
        ([{"body": "x"}], ConfigError, "no column 'text'; there are body"),
        ([{"text": 3}], ConfigError, "'text' of the data set holds int"),
        ([{"text": "short"}], ProfileError, "gives no passage: fewer than 120 tokens"),
        ([], ProfileError, "gives no passage"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_a_clear_error(reader, rows, error, said):
    with pytest.raises(error, match=said):
        list(text_passages(reader, rows, "text", 5, 100, 20))


def test_a_measurement_holds_every_fraction_and_loses_nothing_at_zero(reader):
    rng = random.Random(0)
    passages = list(generated_passages(reader, 3, 300, 40, rng))
    recalls = [make_recall(kind, 300, 2, reader.count_tokens, rng) for kind in ("needle", "qa") for _ in range(2)]
    seen = []
    out = measure(reader, [*passages, ([1, 2, 3], [4, 5])], recalls, (0.5, 0.25), lambda: seen.append(1))
    assert len(seen) == 8
    assert out.num_skipped == 1  # three tokens: nothing to drop
    results = out.results()
    assert [result.fraction for result in results] == [0.0, 0.25, 0.5]
    nothing, quarter, half = results
    assert (nothing.logprob_drop.mean, nothing.dropped_blocks) == (0.0, 0.0)
    assert quarter.logprob_drop.mean != 0.0
    assert half.logprob_drop.num_samples == 3
    assert 0.2 < quarter.dropped_blocks / quarter.total_blocks <= 0.25
    assert 0.45 < half.dropped_blocks / half.total_blocks <= 0.5
    assert out.baselines()["needle"].num_questions == 4


def test_drops_are_paired_by_context():
    out = PruningMeasurement((0.0, 0.5), nats={0.0: [1.0, 5.0], 0.5: [1.25, 5.5]})
    out.guesses["needle"] = [0.1] * 8
    out.right = {("needle", 0.0): [1.0, 0.75], ("needle", 0.5): [0.5, 0.75]}
    out.blocks = {fraction: [(0, 9), (0, 9)] for fraction in out.fractions}
    _, half = out.results()
    assert half.logprob_drop.mean == pytest.approx(0.375)
    assert half.tasks["needle"].drop.mean == pytest.approx(0.25)
    assert half.tasks["needle"].accuracy == pytest.approx(0.625)
    assert half.logprob_drop.high - half.logprob_drop.mean == pytest.approx(12.706 * 0.125, rel=1e-3)


def test_nothing_but_short_passages_is_an_error(reader):
    out = measure(reader, [([1, 2, 3], [4, 5])], [], (0.5,))
    with pytest.raises(ProfileError, match="every passage is too short"):
        _ = out.baseline_nats_per_token


def test_a_wrong_adapter_and_an_empty_directory_are_named(directory, tmp_path):
    with (
        pytest.raises(AdapterError, match="cannot load adapter"),
        loaded_model(directory, ModelConfig(), tmp_path, 1),
    ):
        pass
    with pytest.raises(ProfileError, match="cannot load"), loaded_model(tmp_path, ModelConfig(), None, 1):
        pass
