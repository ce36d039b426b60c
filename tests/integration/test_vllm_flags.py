"""Each row of docs/vllm_flags.md that has an example starts an engine with it, serves, and trains where it says so."""

import itertools

import pytest
import torch

from core.errors import ConfigError
from core.types import FineTuneTask, TaskKind, TokenizedPair
from engine.vllm.flags import ENGINE, FLAGS, FRONTEND
from tests.support.chat_families import FAMILIES
from tests.support.engine_thread import EngineThread
from tests.support.small_llama import prompt_of, save_small_llama

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PAIR = TokenizedPair("p", tuple(range(10, 40)), (40, 41, 42), (50, 51))
NUM_TOKENS = 12

SEEN = {
    "enable_prefix_caching": lambda config: config.cache_config.enable_prefix_caching,
    "block_size": lambda config: config.cache_config.block_size,
    "kv_cache_dtype": lambda config: config.cache_config.cache_dtype,
    "speculative_config": lambda config: config.speculative_config and config.speculative_config.method,
    "enforce_eager": lambda config: config.model_config.enforce_eager,
    "async_scheduling": lambda config: config.scheduler_config.async_scheduling,
    "reasoning_parser": lambda config: config.structured_outputs_config.reasoning_parser,
    "hf_overrides": lambda config: config.model_config.hf_config.rope_parameters["rope_theta"],
    "load_format": lambda config: config.load_config.load_format,
}
"""What vLLM's configuration says of an argument."""
SEEN_AS = {"speculative_config": "ngram", "hf_overrides": 5000.0}
OTHER_NUMBERS = {"kv_cache_dtype", "hf_overrides", "load_format"}
"""With these the model says something else."""

BESIDE = {"load_format": {"share_base_weights": "always"}}
"""Settings of ours that an argument needs."""

_ids = (f"flag-{i}" for i in itertools.count())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("small-llama")


@pytest.fixture(scope="module")
def answer(model_dir, tmp_path_factory):
    """Prompt, and what the model says to it: by transformers. Its tokenizer knows thoughts, for their parser."""
    words = tmp_path_factory.mktemp("qwen3")
    tokenizer = next(family for family in FAMILIES if family.name == "qwen3").save(words)
    model = save_small_llama(model_dir, words, vocab_size=len(tokenizer))
    prompt = [token % len(tokenizer) for token in prompt_of(40, 1)] * 2
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False
        )
    return prompt, ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "flag", [pytest.param(flag, id=flag.names[0]) for flag in FLAGS if flag.example and flag.effect != "refused"]
)
def test_an_engine_with_it_serves_and_trains_as_the_table_says(flag, model_dir, answer):
    prompt, expected = answer
    engine = EngineThread(
        model_dir,
        model={"model_source": str(model_dir), "dtype": "float32"},
        engine={flag.section: flag.example, **BESIDE.get(flag.names[0], {})},
        training={"enabled": flag.effect == "trains"},
    )
    try:
        config = engine.engine.client.vllm_config
        for name, value in flag.example.items():
            if name in SEEN:
                assert SEEN[name](config) == SEEN_AS.get(name, value)
        said = engine.run(engine.generate(prompt, next(_ids), NUM_TOKENS))
        assert len(said) == NUM_TOKENS
        if not OTHER_NUMBERS & set(flag.example):
            assert said == expected
        if flag.effect == "trains":
            steps = train_beside(engine, prompt)
            assert min(step.metrics.grad_norm for step in steps) > 0
            if "load_format" not in flag.example:  # the weights that it makes up are too small for a loss to move
                assert steps[1].metrics.loss < steps[0].metrics.loss
    finally:
        engine.close()


def train_beside(engine, prompt):
    """The results of two steps while a request runs."""
    running = engine.start(engine.generate(prompt, next(_ids), 64))
    steps = [
        engine.run(engine.engine.run_task(FineTuneTask(next(_ids), TaskKind.TRAIN, (PAIR,) * 4))) for _ in range(2)
    ]
    assert [step.error for step in steps] == [None, None]
    assert len(running.result(240)) == 64
    return steps


def test_the_server_has_the_parsers_that_are_named(model_dir, answer):
    """A reasoning parser is an argument of the engine, a tool parser one of the server: both reach the renderer."""
    engine = EngineThread(
        model_dir,
        model={"model_source": str(model_dir)},
        engine={
            ENGINE: {"reasoning_parser": "qwen3"},
            FRONTEND: {"tool_call_parser": "hermes", "enable_auto_tool_choice": True},
        },
    )
    try:
        app = engine.run(engine.engine.build_openai_app(["m"]))
        parser = app.state.online_renderer.parser
        assert "Qwen3" in parser.reasoning_parser_cls.__name__
        assert "Hermes" in parser.tool_parser_cls.__name__
        engine.args.engine.frontend_kwargs["reasoning_parser"] = "qwen3"
        with pytest.raises(ConfigError, match=r"'reasoning_parser' .* belongs under engine\.engine_kwargs"):
            engine.run(engine.engine.build_openai_app(["m"]))
    finally:
        engine.close()
