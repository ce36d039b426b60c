"""Closure and Python that `scripts/setup` takes; a stand-in for Python or uv ends it before the first download."""

import os
import re
import shutil
import subprocess
import sys
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
    commands = {
        "python3.11": PYTHON,
        "nvidia-smi": f"#!/bin/sh\necho '{devices}'\n" if devices else "#!/bin/sh\nexit 9\n",
    }
    run = run_setup(tmp_path, commands)
    assert run.stdout.startswith(f"setup: {closure} closure into .venv ({why}")
    size = re.search("# Download: (.*)", (ROOT / "requirements" / f"{closure}.txt").read_text())
    assert f"setup: downloads about {size[1]}, once" in run.stdout
    assert run.returncode != 0  # the stand-in's


def test_uv_brings_a_python_where_none_fits(tmp_path):
    old = '#!/bin/sh\ncase "$*" in *version_info*) exit 1 ;; *) exit 9 ;; esac\n'
    commands = dict.fromkeys(("python3.11", "python3.12", "python3.13", "python3"), old)
    run = run_setup(tmp_path, commands | {"uv": "#!/bin/sh\necho uv: $*; exit 9\n"})
    assert "a Python 3.11 from uv" in run.stdout
    assert "uv: venv -q --seed --python 3.11 .venv" in run.stdout

    (tmp_path / "bin" / "uv").unlink()
    run = run_setup(tmp_path, commands)
    assert run.returncode == 1
    assert run.stderr.startswith("setup: Python 3.11, 3.12 or 3.13 with venv is needed")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_pins_of_a_closure_fit_every_python(tmp_path, kind, version):
    """The package index is asked; without torch's +cpu build, which other places hold."""
    requirements = ROOT / "requirements"
    pins = (requirements / f"{kind}.txt").read_text().replace("+cpu", "")
    (tmp_path / "pins.txt").write_text(pins)
    (tmp_path / "in.txt").write_text((requirements / f"{kind}.in").read_text().replace("+cpu", ""))
    own = "".join(line for line in pins.splitlines(keepends=True) if line.startswith(("torch==", "triton==")))
    (tmp_path / "overrides.txt").write_text((requirements / "overrides.txt").read_text() + own)
    uv = str(Path(sys.executable).parent / "uv")
    command = [
        uv,
        "pip",
        "compile",
        "-q",
        "in.txt",
        "-c",
        "pins.txt",
        "--override",
        "overrides.txt",
        "--no-annotate",
    ]
    command += ["--python-version", version, "--python-platform", "x86_64-manylinux_2_28"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    missing = names(run.stdout) - names(pins)
    if kind == "cpu":  # torch's build on PyPI is for CUDA
        missing = {name for name in missing if not name.startswith(("nvidia-", "cuda-"))}
    assert not missing


def names(closure):
    return {line.partition("==")[0] for line in closure.splitlines() if "==" in line}


def run_setup(directory, commands):
    """Run a copy of `scripts/setup` that finds these commands first."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, directory / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", directory)
    tools = directory / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in commands.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.defpath}"}
    command = ["sh", str(directory / "scripts" / "setup")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
