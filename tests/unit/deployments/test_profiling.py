import logging
import re

import pytest
from transformers import GPT2Config

from core.batch import ForwardShape, IterationSample
from core.config import AppArgs
from core.types import SliceKind, SliceReport, SliceTiming
from deployments.monitors.profiling import (
    engine_device,
    origin_of,
    target_warnings,
    with_profile_path,
    with_pruning_gate,
    with_trainable_model,
)
from engine.pruning.gate import pruning_report_path
from profiler.fit import fit_profile
from tests.support.quantized_models import change_config
from tests.support.trainable_models import CONFIGS, make_config


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0,1")
    return with_profile_path(AppArgs(state_dir=tmp_path, slo={"tbt_s": 0.05}), tmp_path)


def write_profile(args, decode_s):
    """A device on which every decode step takes that long."""
    samples = [
        IterationSample(
            ForwardShape(num_decode=n % 8 + 1, decode_context=100 * n),
            decode_s,
            overhead_s=0.001,
            report=SliceReport([SliceTiming(kind, 64, 0.001) for kind in SliceKind]),
        )
        for n in range(200)
    ]
    fit_profile(samples, origin_of(args)).save(args.profile.path)


def test_the_profile_is_looked_for_by_device_threads_and_model(args, tmp_path):
    assert args.profile.path.parent.parent == tmp_path / "profiles"
    assert "2-threads" in args.profile.path.parent.name
    assert args.profile.path.name == "mace-tiny.json"


def test_a_path_that_was_given_stays(args, tmp_path):
    assert with_profile_path(args, tmp_path) is args


def test_without_a_profile_nothing_is_warned_of(args):
    assert target_warnings(args) == []


def test_a_target_below_what_the_profiled_device_can_do_is_warned_of(args):
    write_profile(args, decode_s=0.01)
    assert target_warnings(args) == []
    write_profile(args, decode_s=0.2)
    assert any("slo.tbt_s is 0.05 s" in warning for warning in target_warnings(args))


def test_a_damaged_profile_is_a_warning_and_not_the_end(args):
    args.profile.path.parent.mkdir(parents=True)
    args.profile.path.write_text('{"schema_version": 1}')
    (warning,) = target_warnings(args)
    assert "is damaged" in warning


@pytest.fixture
def pruning_args(tmp_path):
    def make(**pruning):
        return AppArgs(kv_pruning={"start": "always", **pruning}, state_dir=tmp_path)

    return make


def test_pruning_that_is_off_looks_at_nothing(pruning_args, tmp_path):
    gated, reason = with_pruning_gate(pruning_args(start="off"), tmp_path)
    assert gated.kv_pruning.start == "off"
    assert reason == "kv_pruning.start is off"


def test_pruning_without_a_report_stays_off_and_names_the_command(pruning_args, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        gated, reason = with_pruning_gate(pruning_args(), tmp_path)
    assert gated.kv_pruning.start == "off"
    assert "mace profile pruning" in reason
    assert reason in caplog.text


def test_a_damaged_pruning_report_is_a_refusal_and_no_crash(pruning_args, tmp_path):
    settings = pruning_args()
    path = pruning_report_path(tmp_path, engine_device(settings, tmp_path), settings.model.model_id)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    gated, reason = with_pruning_gate(settings, tmp_path)
    assert gated.kv_pruning.start == "off"
    assert "damaged" in reason


def test_without_the_gate_pruning_switches_on(pruning_args, tmp_path):
    gated, reason = with_pruning_gate(pruning_args(require_gate=False), tmp_path)
    assert gated.kv_pruning.start == "always"
    assert "require_gate" in reason


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_that_can_be_trained_is(args, tmp_path, kind):
    config = make_config(kind, architectures=["SomeForCausalLM"])
    config.save_pretrained(tmp_path)
    assert with_trainable_model(args, tmp_path) == (args, "")


@pytest.mark.parametrize(
    ("quantization", "said"),
    [(None, r"cannot train gpt2 \(GPT2LMHeadModel\).*supported.*llama"), ({"quant_method": "hqq"}, "with hqq")],
)
def test_one_that_cannot_be_is_served_with_training_off_and_that_is_said(
    args, tmp_path, caplog, quantization, said
):
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    if quantization:
        make_config("llama", architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
        change_config(tmp_path, quantization_config=quantization)
    with caplog.at_level(logging.WARNING):
        served, reason = with_trainable_model(args, tmp_path)
    assert not served.training.enabled
    assert args.training.enabled
    assert re.search(said, reason)
    assert f"training is off: {reason}" in caplog.text


def test_settings_that_switch_training_off_are_named(args, tmp_path):
    off = AppArgs(training={"enabled": False})
    assert with_trainable_model(off, tmp_path) == (off, "training.enabled is false")
    make_config("llama", architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    only = AppArgs(scheduler={"policy": "inference_only"})
    assert with_trainable_model(only, tmp_path) == (only, "scheduler.policy is inference_only")
