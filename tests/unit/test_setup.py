"""Which closure `scripts/setup` takes; a stand-in for Python ends it before the first download."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in *ensurepip* | *version_info*) ;; --version) echo "Python 3.11.2" ;; *) exit 9 ;; esac
"""


@pytest.mark.parametrize(
    ("devices", "closure", "why"),
    [
        (None, "cpu", "nvidia-smi lists no GPU"),
        ("GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)", "gpu", "nvidia-smi lists a GPU"),
        ("GPU 0: Orin (nvgpu) (UUID: N/A)", "cpu", "a Jetson board"),
    ],
)
def test_the_closure_fits_the_device_and_the_reason_is_said(tmp_path, devices, closure, why):
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {
        "python3.11": PYTHON,
        "nvidia-smi": f"#!/bin/sh\necho '{devices}'\n" if devices else "#!/bin/sh\nexit 9\n",
    }
    for name, text in commands.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.defpath}"}
    command = ["sh", str(tmp_path / "scripts" / "setup")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.startswith(f"setup: {closure} closure into .venv ({why}")
    assert run.returncode != 0  # the stand-in's
