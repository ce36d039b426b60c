"""Arguments of vLLM's that cannot be honoured are refused by name, before anything starts."""

import dataclasses

import pytest

from app.main import build_app, parse_args
from core.config import AppArgs
from core.errors import ConfigError
from engine.vllm.compat import make_engine_args
from engine.vllm.flags import ENGINE, FLAGS, FRONTEND, check_flags

ROWS = [pytest.param(flag, id=flag.names[0]) for flag in FLAGS]


def settings(flag, values, *, enabled=True):
    return {"engine": {flag.section: values}, "training": {"enabled": enabled}}


def asking(flag):
    """Values that ask for the row's first argument."""
    return flag.example or {flag.names[0]: "anything"}


@pytest.mark.parametrize("flag", ROWS)
def test_a_row_says_what_was_started_or_why_not(flag):
    assert bool(flag.example) != bool(flag.not_run)
    assert set(flag.example) <= set(flag.names)


@pytest.mark.parametrize("flag", ROWS)
def test_vllm_knows_the_arguments_of_a_row(flag):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    known = {ENGINE: AsyncEngineArgs, FRONTEND: FrontendArgs}[flag.section]
    assert set(flag.names) <= {field.name for field in dataclasses.fields(known)}


@pytest.mark.parametrize("flag", ROWS)
def test_the_same_holds_wherever_settings_come_in(flag):
    raw = settings(flag, asking(flag))
    if flag.effect == "trains":
        parse_args(raw)
        return
    name = rf"engine\.{flag.section}\.{next(iter(asking(flag)))}: "
    for read in (parse_args, lambda raw: build_app(AppArgs.model_validate(raw))):
        with pytest.raises(ConfigError, match=name) as refusal:
            read(raw)
        assert flag.why in str(refusal.value)


@pytest.mark.parametrize("flag", ROWS)
def test_without_training_only_what_is_refused_is_refused(flag):
    args = AppArgs.model_validate(settings(flag, asking(flag), enabled=False))
    if flag.effect == "refused":
        with pytest.raises(ConfigError):
            check_flags(args)
    else:
        check_flags(args)


@pytest.mark.parametrize("flag", ROWS)
def test_a_value_that_asks_for_nothing_is_never_refused(flag):
    for value in flag.unless:
        check_flags(AppArgs.model_validate(settings(flag, dict.fromkeys(flag.names, value))))


def test_every_problem_is_named_at_once():
    engine = {"engine_kwargs": {"tensor_parallel_size": 2, "enable_lora": False}, "frontend_kwargs": {"port": 1}}
    with pytest.raises(ConfigError) as refusal:
        check_flags(AppArgs.model_validate({"engine": engine}))
    lines = str(refusal.value).splitlines()
    assert len(lines) == 3
    assert sum("served with training.enabled: false" in line for line in lines) == 1


def test_a_name_that_vllm_does_not_know_is_an_error_of_the_settings(tiny_assistant):
    args = AppArgs.model_validate({"engine": {"engine_kwargs": {"max_num_sequences": 4}}})
    with pytest.raises(ConfigError, match="no argument 'max_num_sequences'"):
        make_engine_args(args, str(tiny_assistant))
