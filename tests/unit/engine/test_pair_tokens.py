"""The trainer must see the tokens that the server would produce for the same messages."""

import pytest
from transformers import AutoTokenizer

from core.config import TrainingConfig
from core.errors import PairTooLongError, TrainingError
from core.types import TokenizedPair
from core.wire import TrainingPair
from engine.training.pair_tokens import PairTokenizer

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_assistant):
    return PairTokenizer.load(str(tiny_assistant), TrainingConfig(max_prompt_tokens=64, max_length_tokens=128))


@pytest.fixture(scope="module")
def hub_tokenizer(tiny_assistant):
    return AutoTokenizer.from_pretrained(tiny_assistant)


def key_of(pair, *model):
    return PairTokenizer(None, set(), TrainingConfig(), *(model or ("base",))).reference_key(pair)


def test_a_chat_pair_is_the_rendered_template_cut_at_the_prompt(tokenizer, hub_tokenizer):
    pair = tokenizer.tokenize(TrainingPair("p", MESSAGES, "It is Paris.", "Certainly! Paris."))
    prompt = hub_tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert hub_tokenizer.decode(pair.prompt_ids) == prompt
    assert hub_tokenizer.decode(pair.chosen_ids[:-1]) == "It is Paris."
    assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == hub_tokenizer.eos_token_id


def test_a_plain_text_pair_has_no_template(tokenizer, hub_tokenizer):
    pair = tokenizer.tokenize(TrainingPair("p", "Once upon", " a time", " a day"))
    assert hub_tokenizer.decode(pair.prompt_ids) == "Once upon"
    assert hub_tokenizer.decode(pair.chosen_ids[:-1]) == " a time"


def test_pairs_that_differ_only_beyond_the_limit_are_named(tokenizer):
    long = "word " * 200
    with pytest.raises(PairTooLongError, match=r"equal|empty"):
        tokenizer.tokenize(TrainingPair("p", "q", long + "a", long + "b"))


def test_a_template_that_cannot_render_is_a_named_error(tokenizer):
    with pytest.raises(TrainingError, match="chat template"):
        tokenizer.tokenize(TrainingPair("p", [{"content": "no role"}], "a", "b"))


def test_the_weight_comes_along_and_the_key_is_that_of_the_cut_tokens(tokenizer, tiny_assistant):
    pair = TrainingPair("p", MESSAGES, "It is Paris.", "Certainly! Paris.", weight=0.25)
    assert tokenizer.tokenize(pair).weight == 0.25
    short = PairTokenizer.load(str(tiny_assistant), TrainingConfig(max_prompt_tokens=8, max_length_tokens=128))
    assert key_of(tokenizer.tokenize(pair)) != key_of(short.tokenize(pair))


def test_the_key_of_a_reference_is_of_model_precision_and_tokens_and_of_nothing_else():
    pair = TokenizedPair("p", (1, 2), (3,), (4, 5))
    key = key_of(pair)
    assert len(key) == 64
    assert key_of(TokenizedPair("q", (1, 2), (3,), (4, 5), weight=0.5, reference=(-1.0, -1.0))) == key
    others = [
        key_of(pair, "other"),
        key_of(pair, "base", "float32"),
        key_of(pair, "base", "auto", "1-2-3-4"),
        key_of(pair, "base", "auto", "0-2-3-4"),
        key_of(TokenizedPair("p", (1,), (2, 3), (4, 5))),
        key_of(TokenizedPair("p", (1, 2), (3, 4), (5,))),
        key_of(TokenizedPair("p", (1, 2), (4, 5), (3,))),
    ]
    assert len({key, *others}) == 8
    assert key_of(pair, "renamed", "auto", "1-2-3-4") == others[2]
