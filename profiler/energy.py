"""Joules that this machine has taken, from the sensors that it has.

- `rapl`: the energy counters of the CPU packages and of the memory beside them (Intel and AMD, Linux powercap). The
  sub-zones `core` and `uncore` are parts of their package, and `psys` holds the packages: none of these is added.
- `ina`: the current sensors of a Jetson board (INA3221, Linux hwmon), which are what `tegrastats` prints. Read without
  a child process. They measure power, which is integrated over time.
- `nvml`: the energy counter of one NVIDIA GPU, or its power integrated over time where it has no such counter.

A board's sensors stand for all of it, so `ina` is read alone; `rapl` and `nvml` add up. All count the whole package,
board or GPU, whoever works on it.

Nothing here runs by itself: whoever has a beat reads with it. A RAPL counter wraps, and one wrap between two readings
is seen; at a kilowatt the smallest of the usual counters (65 kJ) wraps after a minute, so a reading each
`SAFE_PERIOD_S` is safe. Power is sampled, so shorter periods follow it better; a second is well.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

SAFE_PERIOD_S = 60.0
"""With readings at least this often no wrap-around of a RAPL counter is missed, up to a kilowatt for each package."""
_MIN_RANGE_J = 60_000.0
"""A counter that wraps earlier than this is not safe to read at `SAFE_PERIOD_S`."""
_BOARD_RAILS = (("VDD_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
"""Rails that make up a board: Orin Nano and NX have a sensor of all of it, AGX Orin has one of each supply."""
_NO_NVML = "this engine has no GPU, or no NVML"


class NoSensorError(Exception):
    """A sensor is not there, or cannot be read; the message says why."""


class Sensor(Protocol):
    """A source of joules. Reading it raises OSError or RuntimeError if it has gone."""

    name: str

    def read_j(self) -> float:
        """Joules since the sensor was opened; never less than before."""
        ...


class RaplSensor:
    """Sum of the powercap zones of CPU packages and of their memory."""

    name = "rapl"

    def __init__(self, root: Path = Path("/")) -> None:
        """NoSensorError: there is no zone, its counters may not be read, or they wrap too soon."""
        self._counters = [zone / "energy_uj" for zone in _rapl_zones(root / "sys/class/powercap")]
        if not self._counters:
            raise NoSensorError("no RAPL zone of a CPU package in /sys/class/powercap")
        try:
            self._ranges_uj = [_number(path.with_name("max_energy_range_uj")) for path in self._counters]
            self._last_uj = [_number(path) for path in self._counters]
        except PermissionError as error:
            raise NoSensorError(
                f"RAPL is for root: allow this user to read {self._counters[0].parent.name}/energy_uj and its like"
            ) from error
        except (OSError, ValueError) as error:
            raise NoSensorError(f"RAPL cannot be read: {error}") from error
        if min(self._ranges_uj) < _MIN_RANGE_J * 1e6:
            soonest_j = min(self._ranges_uj) / 1e6
            raise NoSensorError(f"a RAPL counter wraps after {soonest_j:.0f} J, too soon to be followed")
        self._taken_uj = 0

    def read_j(self) -> float:
        """See `Sensor`. A counter below its last value has wrapped, once."""
        for i, path in enumerate(self._counters):
            now_uj = _number(path)
            moved_uj = now_uj - self._last_uj[i]
            self._taken_uj += moved_uj if moved_uj >= 0 else moved_uj + self._ranges_uj[i]
            self._last_uj[i] = now_uj
        return self._taken_uj * 1e-6


class PowerSensor:
    """A source of watts, integrated over time by trapezoids."""

    def __init__(
        self, name: str, read_w: Callable[[], float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._read_w, self._clock = read_w, clock
        self._last_s, self._last_w, self._joules = clock(), read_w(), 0.0

    def read_j(self) -> float:
        """See `Sensor`."""
        now_s, watts = self._clock(), self._read_w()
        self._joules += (now_s - self._last_s) * (watts + self._last_w) / 2
        self._last_s, self._last_w = now_s, watts
        return self._joules


class CounterSensor:
    """A counter of joules that begins anew, if at all, at zero."""

    def __init__(self, name: str, read_total_j: Callable[[], float]) -> None:
        self.name = name
        self._read_total_j = read_total_j
        self._last_j, self._joules = read_total_j(), 0.0

    def read_j(self) -> float:
        """See `Sensor`."""
        total_j = self._read_total_j()
        self._joules += max(0.0, total_j - self._last_j)
        self._last_j = total_j
        return self._joules


class EnergyMeter:
    """The sensors of this machine, read together."""

    def __init__(self, sensors: Sequence[Sensor], missing: Mapping[str, str] | None = None) -> None:
        self._sensors = list(sensors)
        self.missing = dict(missing or {})
        """The reason for which a sensor is not read, by its name."""
        self._joules = dict.fromkeys(self.sensors, 0.0)

    @property
    def sensors(self) -> list[str]:
        """Names of the sensors that are read."""
        return [sensor.name for sensor in self._sensors]

    @property
    def reason(self) -> str | None:
        """The reason for which nothing is measured; None if something is."""
        return None if self._sensors else "; ".join(self.missing.values())

    def read(self) -> dict[str, float]:
        """Joules of each sensor since the start. One that can be read no longer keeps its last value from then on."""
        for sensor in tuple(self._sensors):
            try:
                self._joules[sensor.name] = sensor.read_j()
            except (OSError, RuntimeError, ValueError) as error:
                self._sensors.remove(sensor)
                self.missing[sensor.name] = f"{sensor.name} can be read no longer: {error}"
        return dict(self._joules)


def find_meter(
    nvml: Any = None, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic
) -> EnergyMeter:
    """The sensors of this machine. `nvml` is the module `pynvml` for the GPU of this process, None without one."""
    missing: dict[str, str] = {}
    openers: dict[str, Callable[[], Sensor]] = {
        "ina": lambda: _ina_sensor(root / "sys/class/hwmon", clock),
        "rapl": lambda: RaplSensor(root),
        "nvml": lambda: _nvml_sensor(nvml, clock),
    }
    sensors: list[Sensor] = []
    for name, opened in openers.items():
        try:
            sensors.append(opened())
        except NoSensorError as error:
            missing[name] = str(error)
            continue
        if name == "ina":
            break
    return EnergyMeter(sensors, missing)


def _rapl_zones(powercap: Path) -> list[Path]:
    """Packages and their memory. The same packages stand there again as `intel-rapl-mmio`, which is left out."""
    zones = []
    for package in sorted(powercap.glob("intel-rapl:*")):
        if re.fullmatch(r"intel-rapl:\d+", package.name) and _text(package / "name").startswith("package"):
            parts = sorted(powercap.glob(f"{package.name}:*"))
            zones += [package, *(part for part in parts if _text(part / "name") == "dram")]
    return zones


def _ina_sensor(hwmon: Path, clock: Callable[[], float]) -> PowerSensor:
    rails: dict[str, tuple[Path, Path]] = {}
    for chip in sorted(hwmon.glob("hwmon*")):
        if _text(chip / "name") == "ina3221":
            for label in chip.glob("in*_label"):
                number = label.name.removeprefix("in").removesuffix("_label")
                rails[_text(label)] = (chip / f"in{number}_input", chip / f"curr{number}_input")
    if not rails:
        raise NoSensorError("no current sensor of a Jetson board (INA3221) in /sys/class/hwmon")
    board = next((names for names in _BOARD_RAILS if all(name in rails for name in names)), None)
    if board is None:
        raise NoSensorError(f"the rails of this board are not known: {', '.join(sorted(rails))}")

    def read_w() -> float:
        """Millivolts times milliamperes."""
        return sum(_number(volts) * _number(amperes) for volts, amperes in (rails[name] for name in board)) * 1e-6

    try:
        return PowerSensor("ina", read_w, clock)
    except (OSError, ValueError) as error:
        raise NoSensorError(f"the current sensors of this board cannot be read: {error}") from error


def _nvml_sensor(nvml: Any, clock: Callable[[], float]) -> Sensor:
    if nvml is None:
        raise NoSensorError(_NO_NVML)
    try:
        nvml.nvmlInit()
        handle = _nvml_handle(nvml, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip())
    except nvml.NVMLError as error:
        raise NoSensorError(f"NVML finds no GPU: {error}") from error

    def told(read: Callable[[Any], int]) -> Callable[[], float]:
        """Millijoules or milliwatts, and its errors as those of a sensor."""

        def call() -> float:
            try:
                return read(handle) * 1e-3
            except nvml.NVMLError as error:
                raise RuntimeError(str(error)) from error

        return call

    try:
        return CounterSensor("nvml", told(nvml.nvmlDeviceGetTotalEnergyConsumption))
    except RuntimeError:
        pass  # GPUs before Volta have no counter
    try:
        return PowerSensor("nvml", told(nvml.nvmlDeviceGetPowerUsage), clock)
    except RuntimeError as error:
        raise NoSensorError(f"NVML tells neither energy nor power of this GPU: {error}") from error


def _nvml_handle(nvml: Any, visible: str) -> Any:
    """The first GPU that this process may see."""
    if visible.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(visible)
    return nvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
