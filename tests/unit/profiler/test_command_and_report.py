import json
import os

import pytest
from typer.testing import CliRunner

from app.commands.profile import app
from profiler.device import describe_device, software_versions, worker_threads
from profiler.fit import fit_profile
from profiler.profile import Origin, Profile
from tests.support.synthetic_device import SyntheticDevice

CLI = CliRunner()


@pytest.fixture
def path(tmp_path):
    origin = Origin(device="synthetic", model="m", num_threads=1)
    profile = fit_profile(SyntheticDevice().samples(100), origin, memory=[(64, 1000)])
    profile.save(tmp_path / "p.json")
    return tmp_path / "p.json"


def test_fit_prints_the_same_errors_as_json_and_writes_only_if_told(path, tmp_path):
    before = path.read_bytes()
    result = CLI.invoke(app, ["fit", str(path), "--json", "--out", str(tmp_path / "again.json")])
    assert result.exit_code == 0, result.output
    old = Profile.load(path)
    assert json.loads(result.stdout)["forward_error"] == old.forward_error.model_dump()
    assert Profile.load(tmp_path / "again.json") == old
    assert path.read_bytes() == before
    assert CLI.invoke(app, ["fit", str(path), "--seed", "5"]).exit_code == 0
    assert path.read_bytes() == before


def test_report_draws_a_picture(path):
    result = CLI.invoke(app, ["report", str(path)])
    assert result.exit_code == 0, result.output
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_profile_or_config_ends_with_one_clear_line(tmp_path):
    result = CLI.invoke(app, ["report", str(tmp_path / "none.json")])
    assert result.exit_code == 1
    assert "cannot read profile" in result.stderr
    result = CLI.invoke(app, ["measure", "--config", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert "cannot read" in result.stderr


@pytest.mark.parametrize(
    ("bound", "threads"), [("0", 1), ("0-3", 4), ("0,1,4-5", 4), ("0-1|2-3", 2), ("auto", None), ("", None)]
)
def test_worker_threads_are_read_from_the_binding(monkeypatch, bound, threads):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bound)
    assert worker_threads() == (threads or len(os.sched_getaffinity(0)))


def test_the_device_and_the_software_have_names():
    assert describe_device(1)
    assert "torch" in software_versions()
