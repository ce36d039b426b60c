"""The energy of an executor's machine, for the metrics and `/v1/training`.

Read with the beat at which Serve asks an executor for its load, once a second, so that nothing wakes for it: far more
often than `profiler.energy.SAFE_PERIOD_S` wants.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from core.batch import IterationSample
from deployments.monitors.metrics import Meter
from engine.prefix_cache import read_generated_tokens
from profiler.energy import EnergyMeter
from profiler.energy_account import EnergyAccount


class EnergyMonitor:
    """Reads the sensors and shares out what they counted by what the engine did meanwhile."""

    def __init__(
        self,
        meter: EnergyMeter,
        read_tokens: Callable[[], int | None] = read_generated_tokens,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter = meter
        self._read_tokens, self._clock = read_tokens, clock
        self._account = EnergyAccount()
        self._joules: dict[str, float] = {}
        self._period_j = 0.0
        """Since the period in progress began."""
        self._tokens: int | None = None
        self._num_tokens = 0
        self._begun_s: float | None = None
        self._metrics = Meter("executor")

    def begin_anew(self) -> None:
        """What the engine does until the next reading is not known: that period is nobody's."""
        self._begun_s = None

    def observe(self, samples: Sequence[IterationSample], *, is_at_rest: bool) -> None:
        """Read the sensors; `samples` are the iterations since the last call.

        `is_at_rest`: the engine has nothing to do. If it has, but no iteration has ended, the period goes on.
        """
        if not self._meter.sensors:
            return
        now_s, before, self._joules = self._clock(), self._joules, self._meter.read()
        new = {name: joules - before.get(name, 0.0) for name, joules in self._joules.items()}
        for sensor, joules in new.items():
            self._metrics.count("energy_joules", joules, sensor=sensor)
        self._period_j += sum(new.values())
        if self._begun_s is not None and not samples and not is_at_rest:
            return
        begun_s, self._begun_s = self._begun_s, now_s
        period_j, self._period_j = self._period_j, 0.0
        tokens, self._tokens = self._tokens, self._read_tokens()
        if begun_s is None:
            return
        self._num_tokens += max(0, (self._tokens or 0) - (tokens or 0))
        forward_s = sum(sample.forward_s for sample in samples if sample.shape.num_tokens)
        slices_s = sum(sample.slices_s for sample in samples)
        self._account.add(now_s - begun_s, period_j, forward_s, slices_s)

    def to_wire(self, num_pairs: int) -> dict[str, Any]:
        """See `EnergyAccount.to_wire`, with the joules of each sensor since the start."""
        return {**self._account.to_wire(self._meter, self._num_tokens, num_pairs), "joules": self._joules}
