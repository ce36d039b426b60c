"""Reading behind a pruned cache equals attention that does not see the dropped tokens."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.errors import UnsupportedModelError
from engine.pruning.reader import PrunedReader
from engine.pruning.tasks import make_recall
from engine.tiny.tokenizer import train_tokenizer
from tests.support.trainable_models import VOCAB, save_model

BLOCK = 4
PLAN = {"block_tokens": BLOCK, "sink_tokens": 3, "recent_tokens": 6}
CONTEXT_TOKENS = 50
"""12 full blocks and half a block."""


class NoTokenizer:
    """For tests that speak token ids."""

    eos_token_id = None
    bos_token_id = None
    chat_template = None

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(map(str, ids))


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request, tmp_path_factory):
    directory = save_model(tmp_path_factory.mktemp(request.param), request.param, max_position_embeddings=128)
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def tokens(count, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def masked_logprobs(model, context, continuation, dropped):
    """One forward pass over everything, in which the continuation does not see the dropped blocks."""
    ids = torch.tensor([context + continuation[:-1]])
    length = ids.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    for block in dropped:
        sees[len(context) :, block * BLOCK : (block + 1) * BLOCK] = False
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=sees[None, None]).logits[0, len(context) :]
    return logits.log_softmax(-1).gather(-1, torch.tensor(continuation[1:])[:, None])[:, 0]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5])
def test_logprobs_equal_a_pass_that_does_not_see_the_dropped_blocks(model, fraction):
    reader = PrunedReader(model, NoTokenizer(), **PLAN)
    context, continuation = tokens(CONTEXT_TOKENS), tokens(9, seed=1)
    prefilled = reader.prefill(context)
    dropped = prefilled.dropped(fraction)
    assert len(dropped) == int(12 * fraction)
    expected = masked_logprobs(model, context, continuation, dropped)
    torch.testing.assert_close(reader.logprobs(prefilled, fraction, continuation), expected, atol=1e-5, rtol=1e-5)
    if fraction:
        other = masked_logprobs(model, context, continuation, [])
        assert (other - expected).abs().max() > 1e-3  # the test would see it if nothing were dropped


def test_a_context_can_be_read_again_after_pruning(model):
    reader = PrunedReader(model, NoTokenizer(), **PLAN)
    prefilled = reader.prefill(tokens(CONTEXT_TOKENS))
    questions = [tokens(5, seed=2), tokens(7, seed=3)]
    before = reader.logprobs(prefilled, 0.0, questions[0])
    both = reader.replies(prefilled, 0.25, questions)
    assert both[1:] == reader.replies(prefilled, 0.25, questions[1:])
    assert both[0] != both[1]
    torch.testing.assert_close(reader.logprobs(prefilled, 0.0, questions[0]), before, atol=0, rtol=0)


def test_replies_are_what_generate_says_when_nothing_is_dropped(model):
    reader = PrunedReader(model, NoTokenizer(), **PLAN)
    context, question = tokens(CONTEXT_TOKENS), tokens(5, seed=2)
    (reply,) = reader.replies(reader.prefill(context), 0.0, [question])
    ids = torch.tensor([context + question])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    expected = out[0, ids.shape[1] :].tolist()
    if model.generation_config.eos_token_id in expected:
        expected = expected[: expected.index(model.generation_config.eos_token_id)]
    assert reply == " ".join(map(str, expected))


def test_sinks_and_the_recent_window_are_whole_blocks_and_stay(model):
    reader = PrunedReader(model, NoTokenizer(), **PLAN)
    prefilled = reader.prefill(tokens(CONTEXT_TOKENS))
    assert sorted(prefilled.order) == list(range(1, 10))  # of 12: one for 3 sinks, two for 6 recent tokens
    assert sorted(prefilled.dropped(0.9)) == list(range(1, 10))


def test_a_short_context_loses_nothing(model):
    reader = PrunedReader(model, NoTokenizer(), **PLAN)
    assert reader.prefill(tokens(3 * BLOCK + 3)).dropped(0.9) == []
    assert reader.prefill(tokens(2)).dropped(0.9) == []


def test_the_blocks_of_lowest_score_go_first(model):
    context = tokens(CONTEXT_TOKENS)
    prefilled = PrunedReader(model, NoTokenizer(), **PLAN).prefill(context)
    with torch.inference_mode():
        cache = model(input_ids=torch.tensor([context]), use_cache=True).past_key_values
    per_token = []
    for layer in cache.layers:
        keys = layer.keys[0, :, : 12 * BLOCK]
        anchor = torch.nn.functional.normalize(keys, dim=-1).mean(dim=1, keepdim=True)
        per_token.append(-torch.cosine_similarity(keys, anchor, dim=-1).mean(dim=0))
    scores = torch.stack(per_token).mean(dim=0).view(12, BLOCK).mean(dim=1)
    assert prefilled.order == sorted(range(1, 10), key=lambda block: float(scores[block]))


def test_a_model_with_sliding_windows_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "mistral"))
    with pytest.raises(UnsupportedModelError, match="full attention in every layer"):
        PrunedReader(model, NoTokenizer(), **PLAN).prefill(tokens(20))


def test_a_chat_is_split_behind_the_context(model):
    tokenizer = train_tokenizer()
    reader = PrunedReader(model, tokenizer, **PLAN)
    recall = make_recall("needle", 200, 3, reader.count_tokens, random.Random(0))
    context, questions = reader.recall_ids(recall)
    assert len(questions) == 3
    for ids, question in zip(questions, recall.questions, strict=True):
        text = tokenizer.decode(context + ids)
        assert text.startswith("<|user|>" + recall.context)
        assert text.endswith(question.text + " Answer with one word.<|end|><|assistant|>")
    assert tokenizer.decode(context) == "<|user|>" + recall.context
