"""Closure and Python that `scripts/setup` takes; a stand-in for Python or uv ends it before the first download."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
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


WHEEL = "torch-2.13.0+cu132-cp312-cp312-linux_aarch64.whl"
ORIN = {"nvidia-smi": "#!/bin/sh\necho 'GPU 0: Orin (nvgpu) (UUID: N/A)'\n"}


def test_a_jetson_board_is_told_where_its_torch_comes_from(tmp_path):
    run = run_setup(tmp_path, ORIN)
    assert run.returncode == 2
    assert run.stderr.startswith("setup: PyPI's torch has no sm_87 code")
    assert "--torch WHEEL" in run.stderr
    assert "--index URL" in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("source", [["--torch", WHEEL], ["--index", "https://example.org/simple"]])
def test_a_jetson_board_takes_the_python_of_its_wheels(tmp_path, source):
    python = PYTHON.replace("3.11.2", "3.12.3")
    run = run_setup(tmp_path, {**ORIN, "python3.11": PYTHON, "python3.12": python}, *source)
    assert run.stdout.startswith("setup: jetson closure into .venv (a Jetson board; ")
    assert "Python 3.12.3)" in run.stdout
    assert run.returncode == 9  # the stand-in's


@pytest.mark.parametrize(
    ("words", "release", "problem"),
    [
        (["jetson", "--torch", "torch-2.9.1-cp312-cp312-linux_aarch64.whl"], None, "is no wheel of torch==2.13.0"),
        (["jetson", "--torch", "torchvision-2.13.0-cp312-none-any.whl"], None, "is no wheel of torch==2.13.0"),
        (["--torch", WHEEL], "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic", "R36 has CUDA 12"),
        (["jetson", "--wheelhouse", "house"], None, "name a wheel of torch==2.13"),
        (["--offline"], None, "--offline needs a value"),
        (["--fast", "now"], None, "there is no option --fast"),
        (["tpu"], None, "no such closure: requirements/tpu.txt (use cpu, gpu or jetson)"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_downloaded(tmp_path, words, release, problem):
    if release:
        (tmp_path / "release").write_text(f"{release}\n# KERNEL_VARIANT: oot\n")
    run = run_setup(tmp_path, {"python3.11": PYTHON}, *words)
    assert run.returncode == 2
    assert problem in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert run.stdout == ""


def test_a_closure_for_jetson_has_the_pins_of_the_gpu_closure_and_no_torch():
    jetson, gpu = (
        set((ROOT / "requirements" / f"{kind}.txt").read_text().splitlines()) for kind in ("jetson", "gpu")
    )
    pins = {line for line in jetson if not line.startswith("#")}
    assert pins <= gpu
    assert not {"torch", "nvidia-cublas", "nvidia-cudnn-cu13", "cuda-toolkit"} & names("\n".join(pins))
    assert {"vllm==0.32.0", "sympy==1.14.0"} <= pins
    assert "setuptools==80.10.2" in pins, "vLLM wants setuptools below 81 on Python 3.12"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "version", "platform"),
    [
        ("jetson", "3.12", "aarch64-manylinux_2_39"),  # Ubuntu 24.04, on which JetPack 7.2 stands
        ("gpu", "3.11", "x86_64-manylinux_2_31"),  # on an older C library llguidance would be compiled
        ("cpu", "3.11", "x86_64-manylinux_2_31"),
    ],
)
def test_nothing_of_a_closure_is_built_from_source(tmp_path, kind, version, platform):
    """The package index is asked for a wheel of every pin; `scripts/setup` takes nothing else."""
    requirements = ROOT / "requirements"
    pins = "".join((requirements / f"{name}.txt").read_text() for name in (kind, "tests"))
    (tmp_path / "pins.txt").write_text(pins.replace("+cpu", ""))
    command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "-q", "pins.txt", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", version, "--python-platform", platform]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_a_wheelhouse_is_all_that_a_machine_without_a_network_needs(tmp_path):
    """With a closure of two packages, and then for a board: its own torch with what that asks for beside it."""
    house, pins = tmp_path / "house", "setuptools==80.10.2\ntermcolor==3.3.0\n"
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    name = make_wheel(wheels, WHEEL, "networkx==3.6.1")
    prepare(tmp_path)
    for closure in ("gpu", "jetson"):
        (tmp_path / "requirements" / f"{closure}.txt").write_text(f"# Download: 0.1 GB\n{pins}")
    (tmp_path / "requirements" / "tests.txt").write_text("")
    tools = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "PYTHON": sys.executable}
    settings = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "UV_", "SSL_", "HTTP"))}
    online, offline = tools | settings, tools | {"https_proxy": "http://127.0.0.1:9", "PIP_RETRIES": "0"}

    def setup(environment, *words):
        command = ["sh", str(tmp_path / "scripts" / "setup"), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    made = setup(online, "gpu", "--wheelhouse", "house")
    assert made.returncode == 0, made.stderr
    assert not (tmp_path / ".venv").exists()
    assert setup(offline, "gpu").returncode != 0
    run = setup(offline, "gpu", "--offline", "house")
    assert run.returncode == 0, run.stderr
    assert "downloads" not in run.stdout
    installed = subprocess.run(
        [str(tmp_path / ".venv/bin/python"), "-c", "import termcolor"], capture_output=True, check=False
    )
    assert installed.returncode == 0, installed.stderr

    shutil.rmtree(house)
    made = setup(online, "jetson", "--torch", str(wheels / name), "--wheelhouse", "house")
    assert made.returncode == 0, made.stderr
    found = {path.name.partition("-")[0] for path in house.iterdir()}
    assert found == {"networkx", "setuptools", "termcolor", "torch", "uv"}
    assert [path.name for path in house.glob("uv-*aarch64.whl")]


def make_wheel(directory, name, *needs):
    """A wheel with nothing in it but what it asks for."""
    package, version, *_ = name.split("-")
    information = f"{package}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    tag = name.removesuffix(".whl").split("-", 2)[2]
    with zipfile.ZipFile(directory / name, "w") as wheel:
        wheel.writestr(f"{information}/METADATA", metadata + "".join(f"Requires-Dist: {one}\n" for one in needs))
        wheel.writestr(f"{information}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        wheel.writestr(f"{information}/RECORD", "")
    return name


def test_the_scripts_pass_their_linter():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    scripts = [str(ROOT / name) for name in ("scripts/setup", "scripts/lock", "scripts/check", ".ci/run")]
    run = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


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


def prepare(directory):
    """A copy of what `scripts/setup` needs, which looks for a board's release beside it."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, directory / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", directory)
    script = directory / "scripts" / "setup"
    script.write_text(script.read_text().replace("/etc/nv_tegra_release", str(directory / "release")))


def run_setup(directory, commands, *words):
    """Run a copy of `scripts/setup` that finds these commands first."""
    prepare(directory)
    tools = directory / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in commands.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.defpath}"}
    command = ["sh", str(directory / "scripts" / "setup"), *words]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
