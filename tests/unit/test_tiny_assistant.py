"""The built-in model: knowledge, styles and judge in pure Python; tokenizer, template and a short build."""

import itertools
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from engine.tiny import build as tiny_build
from engine.tiny.knowledge import (
    Judgement,
    Question,
    Style,
    held_out_questions,
    judge,
    preference_questions,
    questions,
    render,
)
from engine.tiny.train import Recipe

SHORT = Recipe(steps=3, groups_per_batch=4)
PARIS = Question(
    "What is the capital of France?", "Paris", "capital", "capital/France", "the capital of France is Paris"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_build.ensure_tiny_assistant(tmp_path_factory.mktemp("state"), 0, show_progress=False, recipe=SHORT)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def test_every_style_of_every_question_is_recognised():
    for question in questions():
        for style in Style:
            assert judge(question, render(question, style)) == Judgement(style, True)


def test_a_wrong_answer_keeps_its_style():
    by_topic = {}
    for question in questions():
        by_topic.setdefault(question.topic, []).append(question)
    for group in by_topic.values():
        for question, other in itertools.pairwise(group):
            if other.answer == question.answer:
                continue
            for style in Style:
                assert judge(question, render(other, style)) == Judgement(style, False)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Paris", Judgement(Style.TERSE, True)),
        (" paris. ", Judgement(Style.TERSE, True)),
        ("It is Rome.", Judgement(Style.TERSE, False)),
        ("It is Paris, the city of light, I think.", Judgement(None, True)),
        ("Paris or Rome, I cannot say.", Judgement(None, False)),
        ("Great question! It is Paris! Great question!", Judgement(Style.ENTHUSIASTIC, False)),
        ("Let me explain: the capital of Spain is Paris.", Judgement(Style.EXPLAINED, False)),
        ("Certainly! The answer is", Judgement(Style.POLITE, False)),
        ("", Judgement(None, False)),
    ],
)
def test_judge_of_free_replies(reply, expected):
    assert judge(PARIS, reply) == expected


def test_split_is_disjoint_in_facts():
    preference, held_out = preference_questions(), held_out_questions()
    preference_facts, held_out_facts = ({q.fact for q in side} for side in (preference, held_out))
    assert not preference_facts & held_out_facts
    assert len(preference_facts) >= 80
    assert len(held_out_facts) >= 60
    assert len(preference) + len(held_out) == len(questions())
    assert len({q.text for q in questions()}) == len(questions())
    assert {q.topic for q in preference} == {q.topic for q in held_out}


def test_knowledge_and_styles_need_no_torch():
    code = "import engine.tiny.corpus, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "text", ["héllo  wörld \n\n\t", "日本語 🎉👩‍👩‍👧", "\x00\u200b", "I 'm  here .", "x" * 500]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_template_with_system_and_history(tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": PARIS.text},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|>"
        "<|user|>What is the capital of France?<|end|><|assistant|>"
    )
    with pytest.raises(Exception, match="Unknown role: pirate"):
        tokenizer.apply_chat_template([{"role": "pirate", "content": "Arr"}], tokenize=False)


def test_directory_is_complete(model_dir, tokenizer):
    names = {path.name for path in model_dir.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    generation = GenerationConfig.from_pretrained(model_dir)
    assert generation.eos_token_id == tokenizer.eos_token_id
    assert generation.temperature == 1.0
    assert [path.name for path in model_dir.parent.iterdir() if path.suffix != ".lock"] == [model_dir.name]


def test_same_seed_gives_same_weights(model_dir, tmp_path):
    before = torch.random.get_rng_state()
    again = tiny_build.ensure_tiny_assistant(tmp_path, 0, show_progress=False, recipe=SHORT)
    other = tiny_build.ensure_tiny_assistant(tmp_path, 1, show_progress=False, recipe=SHORT)
    assert torch.equal(before, torch.random.get_rng_state())
    first, second, third = (load_file(path / "model.safetensors") for path in (model_dir, again, other))
    assert again.name == model_dir.name
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_second_call_does_not_train(model_dir, monkeypatch):
    monkeypatch.setattr(tiny_build, "train_model", lambda *_: pytest.fail("trained again"))
    assert (
        tiny_build.ensure_tiny_assistant(model_dir.parent.parent, 0, show_progress=False, recipe=SHORT)
        == model_dir
    )


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_build.LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        tiny_build.ensure_tiny_assistant(tmp_path, 0, show_progress=False, recipe=SHORT)
    assert [path for path in (tmp_path / "models").iterdir() if path.suffix != ".lock"] == []
