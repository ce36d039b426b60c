"""Joules of this machine while something is measured, by the formula of `profiler.energy_account`."""

import time
from collections.abc import Callable
from typing import Any

from engine.vllm.compat import gpu_nvml
from profiler.energy import EnergyMeter, find_meter
from profiler.energy_account import EnergyAccount

_SETTLE_S = 1.0
_IDLE_S = 6.0
"""An idle period of this length says what idling takes."""


class EnergyWatch:
    """Periods one after another, each with what was done in it."""

    def __init__(self, meter: EnergyMeter | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`meter` None: the sensors of this machine."""
        self.meter = find_meter(gpu_nvml()) if meter is None else meter
        self._account, self._clock = EnergyAccount(), clock
        self._last_s, self._last_j = clock(), self._read_j()

    def idle(self) -> None:
        """Wait while nothing is asked, to know what idling takes; at once without a sensor."""
        if self.meter.sensors:
            time.sleep(_SETTLE_S)
            self.skip()
            time.sleep(_IDLE_S)
            self.add()

    def skip(self) -> None:
        """What has happened since the last call is left out."""
        self._last_s, self._last_j = self._clock(), self._read_j()

    def add(self, forward_s: float = 0.0, slices_s: float = 0.0) -> None:
        """Since the last call the device was busy so long; not at all is an idle period."""
        before_s, before_j = self._last_s, self._last_j
        self.skip()
        self._account.add(self._last_s - before_s, self._last_j - before_j, forward_s, slices_s)

    def to_wire(self, num_tokens: float, num_pairs: float) -> dict[str, Any]:
        """See `EnergyAccount.to_wire`."""
        return self._account.to_wire(self.meter, num_tokens, num_pairs)

    def told(self) -> dict[str, Any]:
        """The sensors, and the reason if there are none."""
        return {"sensors": self.meter.sensors, "reason": self.meter.reason}

    def _read_j(self) -> float:
        return sum(self.meter.read().values())


def told(energy: dict[str, Any]) -> str:
    """The energy of a report in words."""
    if energy["reason"] is not None:
        return f"energy is not known: {energy['reason']}"
    return joules_of(energy)


def joules_of(energy: dict[str, Any]) -> str:
    """Its numbers, as far as they are known."""
    names = {
        "mean_w": "W",
        "idle_w": "W idle",
        "joules_per_1000_tokens": "J/1,000 tokens",
        "joules_per_pair": "J/pair",
    }
    return ", ".join(f"{energy[key]:.3g} {name}" for key, name in names.items() if energy.get(key) is not None)
