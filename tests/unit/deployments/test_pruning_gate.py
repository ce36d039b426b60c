"""KV pruning does not switch on unmeasured, and says why."""

import logging

import pytest

from core.config import AppArgs
from deployments.pruning_gate import with_pruning_gate
from engine.pruning.gate import pruning_report_path
from engine.vllm.compat import worker_binding
from profiler.device import describe_device, worker_threads


@pytest.fixture
def args(tmp_path):
    def make(**pruning):
        return AppArgs(kv_pruning={"start": "always", **pruning}, state_dir=tmp_path)

    return make


def test_switched_off_it_looks_at_nothing(args, tmp_path):
    gated, reason = with_pruning_gate(args(start="off"), tmp_path)
    assert gated.kv_pruning.start == "off"
    assert reason == "kv_pruning.start is off"


def test_without_a_report_it_stays_off_and_names_the_command(args, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        gated, reason = with_pruning_gate(args(), tmp_path)
    assert gated.kv_pruning.start == "off"
    assert "mace profile pruning" in reason
    assert reason in caplog.text


def test_a_damaged_report_is_a_refusal_and_no_crash(args, tmp_path):
    settings = args()
    device = describe_device(worker_threads(worker_binding(settings, tmp_path)))
    path = pruning_report_path(tmp_path, device, settings.model.model_id)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    gated, reason = with_pruning_gate(settings, tmp_path)
    assert gated.kv_pruning.start == "off"
    assert "damaged" in reason


def test_without_the_gate_it_switches_on(args, tmp_path):
    gated, reason = with_pruning_gate(args(require_gate=False), tmp_path)
    assert gated.kv_pruning.start == "always"
    assert "require_gate" in reason
