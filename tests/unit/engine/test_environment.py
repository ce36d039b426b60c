"""What the engine's processes find in their environment."""

import os

import pytest

from core.config import AppArgs
from engine.vllm.compat import configure_environment


@pytest.fixture
def args():
    return AppArgs.model_validate({"model": {"model_source": "builtin:tiny"}})


def test_threads_of_the_worker_wait_for_each_other_only_for_an_instant(args, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    configure_environment(args, tmp_path)
    assert int(os.environ["GOMP_SPINCOUNT"]) < 10_000


def test_what_the_environment_says_wins(args, tmp_path, monkeypatch):
    given = {"GOMP_SPINCOUNT": "7", "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    monkeypatch.setattr(os, "environ", dict(given))
    configure_environment(args, tmp_path)
    assert {name: os.environ[name] for name in given} == given
