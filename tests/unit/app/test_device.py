"""What is asked of a GPU and of a Jetson board; only what such a device says of itself is made up."""

from types import SimpleNamespace

import pytest
import torch

from app.commands import device
from app.commands.device import gpu_code_problem, jetson_checks
from app.commands.doctor import examine
from app.commands.serve import _prepare
from core.config import AppArgs
from core.errors import ConfigError

GIB = 1 << 30
PYPI_ARM64 = "sm_80 sm_90 sm_100 sm_110 sm_120"
RELEASE = "# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64, DATE: Mon Jun  1 2026\n"
NO_SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
ZRAM = NO_SWAPS + "".join(f"/dev/zram{i}   partition\t2616652\t\t0\t\t5\n" for i in range(2))


def swap_file(used_kib):
    return NO_SWAPS + f"/mnt/nvme/swap   file\t16777212\t\t{used_kib}\t\t-2\n"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some capability, and a torch with code for some."""

    def set_up(capability, codes):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: codes.split())

    return set_up


@pytest.fixture
def board(monkeypatch, tmp_path):
    """A Jetson board that is as it should be but for what a test says."""

    def set_up(release=RELEASE, power="NV Power Mode: MAXN\n0\n", swaps=NO_SWAPS, free=50, cached=4, available=54):
        monkeypatch.setattr(device, "TEGRA_RELEASE", tmp_path / "release")
        monkeypatch.setattr(device, "SWAPS", tmp_path / "swaps")
        (tmp_path / "release").write_text(release)
        (tmp_path / "swaps").write_text(swaps)
        commands = {"nvpmodel": power, "nvidia-smi": "GPU 0: Orin (nvgpu) (UUID: N/A)\n"}
        monkeypatch.setattr(device, "_output", lambda *command: commands[command[0]])
        sizes = {"total": 61.4, "free": free, "cached": cached, "available": available}
        memory = SimpleNamespace(**{name: int(size * GIB) for name, size in sizes.items()})
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory)

    return set_up


def outcomes(**engine):
    return {name: check() for name, check in jetson_checks(AppArgs(engine=engine)).items()}


@pytest.mark.parametrize(
    ("capability", "codes", "runs"),
    [
        ((8, 7), PYPI_ARM64, False),
        ((8, 7), "sm_80 sm_86 sm_90", False),  # of its generation, but for cards
        ((8, 7), "sm_87", True),
        ((8, 7), "sm_80 compute_80", True),  # compiled when it is loaded
        ((8, 6), "sm_87", False),
        ((8, 6), "sm_80", True),
        ((8, 6), "sm_89", False),
        ((9, 0), "sm_90a", True),
        ((12, 0), "sm_90 compute_90", True),
        ((10, 3), "sm_100a", False),
        ((11, 0), PYPI_ARM64, True),
        ((7, 5), PYPI_ARM64, False),
        ((8, 0), "gfx942", False),
    ],
)
def test_code_that_runs_on_a_gpu_and_code_that_does_not(gpu, capability, codes, runs):
    gpu(capability, codes)
    assert (gpu_code_problem() == "") is runs


def test_serve_stops_with_one_line_where_torch_has_no_code_for_the_gpu(gpu, board, tmp_path):
    board()
    gpu((8, 7), PYPI_ARM64)
    with pytest.raises(ConfigError) as raised:
        _prepare({"args": {"state_dir": str(tmp_path / "state")}})
    line = str(raised.value)
    assert "has no code for this GPU (sm_87), only sm_80 sm_90" in line
    assert "scripts/setup jetson --torch WHEEL" in line
    assert "\n" not in line
    assert not (tmp_path / "state").exists()


def test_the_doctor_shows_the_gpu_and_the_board(gpu, board, tmp_path):
    board()
    gpu((8, 7), PYPI_ARM64)
    found = {finding.check: finding for finding in examine(tmp_path)}
    assert found["gpu"].status == "error"
    assert "no code for this GPU (sm_87)" in found["gpu"].found
    assert found["gpu"].fix.startswith("scripts/setup jetson")
    assert {found[name].status for name in ("jetpack", "power mode", "unified memory", "swap")} == {"ok"}
    assert found["jetpack"].found == "Jetson Linux 39.2.0"


def test_other_machines_have_no_such_checks(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "TEGRA_RELEASE", tmp_path / "none")
    monkeypatch.setattr(device, "_output", lambda *command: "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n")
    assert jetson_checks(AppArgs()) == {}


@pytest.mark.parametrize(
    ("name", "facts", "status", "found", "fix"),
    [
        ("jetpack", {"release": RELEASE.replace("R39", "R36")}, "error", "Jetson Linux 36.2.0", "JetPack 7.2"),
        ("jetpack", {"release": ""}, "warning", "does not say", "JetPack 7.2"),
        ("power mode", {"power": "NV Power Mode: MODE_30W\n2\n"}, "warning", "MODE_30W", "sudo nvpmodel -m 0"),
        ("power mode", {"power": "NV Power Mode: MAXN_SUPER\n2\n"}, "ok", "MAXN_SUPER", ""),
        ("power mode", {"power": ""}, "warning", "does not say", "outside of a container"),
        ("unified memory", {"free": 20, "cached": 30}, "warning", "20.0 of 61.4 GiB free", "drop_caches"),
        ("unified memory", {"free": 20, "available": 22}, "warning", "vLLM asks for 30.7", "no desktop"),
        ("swap", {"swaps": ZRAM}, "warning", "/dev/zram0, /dev/zram1", "nvzramconfig"),
        ("swap", {"swaps": swap_file(2 << 20)}, "warning", "2.0 GiB in use", "stop what else runs"),
        ("swap", {"swaps": swap_file(0)}, "ok", "/mnt/nvme/swap", ""),
    ],
)
def test_what_a_board_lacks_is_found_with_what_to_do(board, name, facts, status, found, fix):
    board(**facts)
    outcome = outcomes(gpu_memory_utilization=0.5)[name]
    assert outcome[0] == status
    assert found in outcome[1]
    assert fix in outcome[2]
