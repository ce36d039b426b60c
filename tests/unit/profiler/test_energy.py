"""Sensors of energy, on files and answers as Linux, tegrastats and NVML give them."""

import re
from types import SimpleNamespace

import pytest

from profiler.energy import EnergyMeter, PowerSensor, find_meter

TEGRASTATS = (
    "11-14-2025 09:21:07 RAM 3391/7620MB (lfb 5x4MB) SWAP 0/3810MB (cached 0MB) CPU [12%@1510,9%@1510,off,off,2%@729,"
    "1%@729] EMC_FREQ 4%@2133 GR3D_FREQ 34%@[611] cpu@50.2C soc2@49.1C tj@50.3C VDD_IN 5062mW/4920mW "
    "VDD_CPU_GPU_CV 803mW/790mW VDD_SOC 1446mW/1430mW"
)
"""A line as tegrastats prints it on an Orin Nano: each rail now, and its mean."""

XEON = {  # two sockets; socket 0 with its parts, and the same packages once more through MMIO
    "intel-rapl:0": ("package-0", 262_143_328_850, 109_463_215_000),
    "intel-rapl:0:0": ("dram", 65_712_999_613, 21_000_000_000),
    "intel-rapl:1": ("package-1", 262_143_328_850, 262_143_000_000),
    "intel-rapl:1:0": ("dram", 65_712_999_613, 65_712_000_000),
    "intel-rapl-mmio:0": ("package-0", 262_143_328_850, 109_463_215_000),
}
LAPTOP = {
    "intel-rapl:0": ("package-0", 262_143_328_850, 5_000_000),
    "intel-rapl:0:0": ("core", 262_143_328_850, 3_000_000),
    "intel-rapl:0:1": ("uncore", 262_143_328_850, 1_000_000),
    "intel-rapl:1": ("psys", 262_143_328_850, 9_000_000),
}


def write_rapl(root, zones):
    for zone, (name, range_uj, energy_uj) in zones.items():
        directory = root / "sys/class/powercap" / zone
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "name").write_text(f"{name}\n")
        (directory / "max_energy_range_uj").write_text(f"{range_uj}\n")
        (directory / "energy_uj").write_text(f"{energy_uj}\n")


def move(root, zone, by_uj):
    """Let a counter go on as the kernel does, past its range to zero."""
    directory = root / "sys/class/powercap" / zone
    most, now = (int((directory / name).read_text()) for name in ("max_energy_range_uj", "energy_uj"))
    (directory / "energy_uj").write_text(f"{(now + by_uj) % most}\n")


def write_ina(root, rails, chip="hwmon3"):
    """Rails by label, in millivolts and milliamperes."""
    directory = root / "sys/class/hwmon" / chip
    directory.mkdir(parents=True)
    (directory / "name").write_text("ina3221\n")
    for number, (label, (millivolts, milliamperes)) in enumerate(rails.items(), start=1):
        (directory / f"in{number}_label").write_text(f"{label}\n")
        (directory / f"in{number}_input").write_text(f"{millivolts}\n")
        (directory / f"curr{number}_input").write_text(f"{milliamperes}\n")
    (directory / "in7_label").write_text("sum of shunt voltages\n")


class NvmlError(Exception):
    pass


def nvml(*, energy_mj=None, power_mw=None, fails=""):
    """The part of pynvml that is used; what is None is not supported by the GPU."""
    asked = []

    def give(value, name):
        def call(handle):
            asked.append((name, handle))
            if value is None or fails:
                raise NvmlError(fails or "Not Supported")
            return value.pop(0) if len(value) > 1 else value[0]

        return call

    def by(kind):
        return lambda name: (kind, name)

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=by("index"),
        nvmlDeviceGetHandleByUUID=by("uuid"),
        nvmlDeviceGetTotalEnergyConsumption=give(energy_mj, "energy"),
        nvmlDeviceGetPowerUsage=give(power_mw, "power"),
        asked=asked,
    )


def test_rapl_adds_the_packages_and_their_memory_and_counts_nothing_twice(tmp_path):
    write_rapl(tmp_path, XEON)
    meter = find_meter(root=tmp_path)
    assert meter.sensors == ["rapl"]
    assert meter.reason is None
    assert meter.read() == {"rapl": 0.0}
    for zone, joules in (("intel-rapl:0", 30), ("intel-rapl:0:0", 4), ("intel-rapl-mmio:0", 30)):
        move(tmp_path, zone, joules * 1_000_000)
    assert meter.read()["rapl"] == pytest.approx(34)


def test_parts_of_a_package_and_the_platform_are_not_added_to_it(tmp_path):
    write_rapl(tmp_path, LAPTOP)
    meter = find_meter(root=tmp_path)
    for zone in LAPTOP:
        move(tmp_path, zone, 7_000_000)
    assert meter.read()["rapl"] == pytest.approx(7)


def test_a_counter_that_wraps_goes_on(tmp_path):
    write_rapl(tmp_path, XEON)
    meter = find_meter(root=tmp_path)
    taken_j = 0.0
    for joules in (50, 200_000, 100_000, 12):  # package-1 is 0.3 J before its end
        move(tmp_path, "intel-rapl:1", joules * 1_000_000)
        taken_j += joules
        assert meter.read()["rapl"] == pytest.approx(taken_j)


def test_rapl_that_is_for_root_says_so(tmp_path, monkeypatch):
    write_rapl(tmp_path, XEON)
    read_text = type(tmp_path).read_text

    def refuse(path, *args, **kwargs):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(type(tmp_path), "read_text", refuse)
    meter = find_meter(root=tmp_path)
    assert meter.sensors == []
    assert "RAPL is for root: allow this user to read intel-rapl:0/energy_uj" in meter.reason


def test_a_counter_that_wraps_too_soon_is_refused(tmp_path):
    write_rapl(tmp_path, {"intel-rapl:0": ("package-0", 1_000_000_000, 5)})
    assert "wraps after 1000 J" in find_meter(root=tmp_path).reason


def test_the_sensors_of_a_board_say_what_tegrastats_prints(tmp_path):
    rails = {"VDD_IN": (5056, 1001), "VDD_CPU_GPU_CV": (5048, 159), "VDD_SOC": (5048, 286)}
    write_ina(tmp_path, rails)
    write_rapl(tmp_path, LAPTOP)
    clock = iter([0.0, 1.0]).__next__
    meter = find_meter(nvml(energy_mj=[1]), tmp_path, clock)
    assert meter.sensors == ["ina"]  # the board holds CPU and GPU
    printed_mw = int(re.search(r"VDD_IN (\d+)mW", TEGRASTATS)[1])
    assert meter.read()["ina"] * 1000 == pytest.approx(printed_mw, abs=1)  # in a second


def test_a_board_without_a_sensor_of_all_of_it_is_the_sum_of_its_supplies(tmp_path):
    write_ina(tmp_path, {"VDD_GPU_SOC": (19_000, 200), "VDD_CPU_CV": (19_000, 100), "VIN_SYS_5V0": (5000, 800)})
    write_ina(tmp_path, {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (5000, 300)}, "hwmon4")
    meter = find_meter(root=tmp_path, clock=iter([0.0, 1.0]).__next__)
    assert meter.read()["ina"] == pytest.approx(3.8 + 1.9 + 4.0)


def test_unknown_rails_are_not_guessed_at(tmp_path):
    write_ina(tmp_path, {"VDD_NEW": (5000, 1)})
    assert "the rails of this board are not known: VDD_NEW" in find_meter(root=tmp_path).missing["ina"]


def test_power_is_integrated_over_time():
    now, watts = [10.0], [100.0]
    sensor = PowerSensor("ina", lambda: watts[0], lambda: now[0])
    assert sensor.read_j() == 0
    now[0], watts[0] = 12.0, 200.0
    assert sensor.read_j() == pytest.approx(300)
    now[0] = 13.0
    assert sensor.read_j() == pytest.approx(500)


def test_nvml_counts_from_the_start(tmp_path):
    write_rapl(tmp_path, LAPTOP)
    gpu = nvml(energy_mj=[7_812_345, 7_812_345, 7_912_345, 0, 5_000])  # it ends with a driver that was loaded anew
    meter = find_meter(gpu, tmp_path)
    assert meter.sensors == ["rapl", "nvml"]
    assert [meter.read()["nvml"] for _ in range(4)] == pytest.approx([0, 100, 100, 105])


@pytest.mark.parametrize(
    ("visible", "handle"), [("", ("index", 0)), ("2,3", ("index", 2)), ("GPU-1a2b", ("uuid", "GPU-1a2b"))]
)
def test_the_gpu_is_the_first_that_this_process_sees(tmp_path, monkeypatch, visible, handle):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = nvml(energy_mj=[0])
    find_meter(gpu, tmp_path)
    assert gpu.asked == [("energy", handle)]


def test_a_gpu_without_a_counter_is_measured_by_its_power(tmp_path):
    meter = find_meter(nvml(power_mw=[250_000]), tmp_path, iter([0.0, 2.0]).__next__)
    assert meter.sensors == ["nvml"]
    assert meter.read()["nvml"] == 500


def test_without_any_sensor_every_reason_is_told(tmp_path):
    meter = find_meter(nvml(), tmp_path)
    assert meter.read() == {}
    for part in ("INA3221", "no RAPL zone", "neither energy nor power"):
        assert part in meter.reason
    assert "no GPU" in find_meter(root=tmp_path).reason


def test_a_sensor_that_goes_keeps_what_it_counted(tmp_path):
    write_rapl(tmp_path, LAPTOP)
    meter = find_meter(root=tmp_path)
    move(tmp_path, "intel-rapl:0", 3_000_000)
    assert meter.read() == {"rapl": pytest.approx(3)}
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    assert meter.read() == {"rapl": pytest.approx(3)}
    assert meter.sensors == []
    assert "can be read no longer" in meter.reason


def test_an_empty_meter_says_nothing_of_sensors():
    assert EnergyMeter([], {"rapl": "none"}).reason == "none"
