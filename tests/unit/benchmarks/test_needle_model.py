"""The needle model's parts; whether it learns is what docs/measurements/kv_pruning.md measures."""

import dataclasses
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.studies import needle_model
from benchmarks.studies.needle_model import NeedleRecipe, ensure_needle_model
from benchmarks.studies.pruning_methods import METHODS, method_scores
from engine.pruning.scores import choose_blocks, score_blocks, summarize

RECIPE = NeedleRecipe(steps=6, tokens_per_step=400)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return ensure_needle_model(tmp_path_factory.mktemp("state"), recipe=RECIPE)


def test_it_is_an_ordinary_model_directory_and_is_built_once(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("The code word of Lisbon is amber.")["input_ids"]
    assert len(ids) == 8
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.chat_template is None
    built_at = directory.stat().st_mtime_ns
    assert ensure_needle_model(directory.parent.parent, recipe=RECIPE) == directory
    assert directory.stat().st_mtime_ns == built_at
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    AutoModelForCausalLM.from_pretrained(directory)


def test_the_same_seed_gives_the_same_weights_and_another_others(directory, tmp_path):
    again = AutoModelForCausalLM.from_pretrained(ensure_needle_model(tmp_path, recipe=RECIPE)).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(directory).state_dict().items():
        assert torch.equal(weight, again[name]), name
    other = AutoModelForCausalLM.from_pretrained(ensure_needle_model(tmp_path, seed=1, recipe=RECIPE)).state_dict()
    assert not torch.equal(other["lm_head.weight"], again["lm_head.weight"])


def test_another_recipe_has_a_directory_of_its_own(directory, tmp_path):
    other = ensure_needle_model(tmp_path, recipe=dataclasses.replace(RECIPE, steps=2))
    assert other.name != directory.name


def test_heads_of_the_first_layer_start_looking_back():
    tokenizer = needle_model.train_tokenizer()
    torch.manual_seed(0)
    model = needle_model.new_model(tokenizer, NeedleRecipe()).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(2, len(tokenizer), (4, 60))
    with torch.inference_mode():
        attention = model(ids, output_attentions=True).attentions[0]
    for head in range(4):
        seen = attention[:, head, 20:].diagonal(offset=20 - head - 1, dim1=1, dim2=2)
        assert seen.mean() > 0.5


def test_a_repeat_is_only_asked_for_what_looking_back_tells():
    for seed in range(30):
        row = needle_model.repeated_row(90, 199, random.Random(seed))
        assert len(row.ids) == len(row.weights) == 90
        pairs = list(zip(row.ids, row.ids[1:], strict=False))
        new = [
            pair
            for i, pair in enumerate(pairs)
            if row.weights[i + 1] and pair not in pairs[:i]  # never seen in this order
        ]
        assert sum(map(bool, row.weights)) > 30
        assert len(new) <= 1  # from the end of the run to its beginning


def test_answers_have_the_weight():
    encode = lambda text: needle_model.re.findall(r"\w+|[^\w\s]", text)  # noqa: E731
    row = needle_model.recall_row(150, encode, NeedleRecipe(), random.Random(4))
    heavy = [token for token, weight in zip(row.ids, row.weights, strict=True) if weight > 1]
    assert 6 <= len(heavy) <= 8
    context = " ".join(row.ids[: row.ids.index("?")])
    assert all(f" {word} ." in context for word in heavy)


def test_random_and_oldest_are_scores_that_ignore_the_keys():
    stats = summarize(torch.randn(6, 16, 2, 8))[None]
    for method in METHODS:
        assert method_scores(method, 0)(stats, 96).shape == (6,)
    assert choose_blocks(method_scores("oldest", 0)(stats, 96).tolist(), 3) == [0, 1, 2]
    draws = [method_scores("random", seed)(stats, 96) for seed in (0, 1)]
    assert not torch.equal(*draws)
    assert method_scores("keydiff", 0) is score_blocks
