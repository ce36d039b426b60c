"""The device that the simulated executors run on: what iterations really cost, as far as the profile knows.

Noise is a factor drawn from the quantiles of measured over predicted latency in the profile. Iterations and slices draw
from separate streams of the executor's own, one draw for each, so a run gives the same numbers whether its iterations
are simulated one by one or in a stretch.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from core.batch import ForwardShape
from core.errors import ConfigError
from core.types import SliceKind
from simulator.trace import SlowDown

_BLOCK = 4096


class DeviceModel(Protocol):
    """What a fitted profile says of a device (`simulator.profiled.ProfiledDevice` is the real one)."""

    @property
    def overhead_s(self) -> float:
        """Time of an iteration that is neither forward pass nor slices."""
        ...

    @property
    def forward_factors(self) -> Sequence[float]:
        """Measured over predicted latency of forward passes at evenly spaced quantiles; empty: no noise known."""
        ...

    @property
    def slice_factors(self) -> Sequence[float]:
        """The same of slices."""
        ...

    def forward_s(self, shape: ForwardShape) -> float:
        """Latency of a forward pass in seconds."""
        ...

    def slice_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Latency of a slice in seconds; None if the profile does not know its kind."""
        ...


class NoiseStream:
    """Factors drawn by inverse transform from quantiles, each used once and in order."""

    def __init__(self, quantiles: Sequence[float], seed: np.random.SeedSequence) -> None:
        self._quantiles = np.asarray(quantiles, dtype=np.float64)
        self._levels = np.linspace(0.0, 1.0, max(len(quantiles), 1))
        self._rng = np.random.default_rng(seed)
        self._factors: list[float] = []
        self._next = 0

    def ahead(self, count: int) -> list[float]:
        """The next `count` factors, without taking them."""
        while self._next + count > len(self._factors):
            self._factors = self._factors[self._next :] + self._draw()
            self._next = 0
        return self._factors[self._next : self._next + count]

    def take(self, count: int = 1) -> None:
        """Use up the next `count` factors, which `ahead` has shown."""
        self._next += count

    def _draw(self) -> list[float]:
        if self._quantiles.size < 2:
            return [1.0] * _BLOCK
        drawn = np.interp(self._rng.random(_BLOCK), self._levels, self._quantiles)
        factors: list[float] = drawn.tolist()
        return factors


class Device:
    """One executor's device: the model of it, times noise, times a slow-down from some moment on."""

    def __init__(
        self, model: DeviceModel, *, seed: np.random.SeedSequence, noise: bool, slow_down: SlowDown | None
    ) -> None:
        forward_seed, slice_seed = seed.spawn(2)
        self._model = model
        self._forward_noise = NoiseStream(model.forward_factors if noise else (), forward_seed)
        self._slice_noise = NoiseStream(model.slice_factors if noise else (), slice_seed)
        self._slow_at_s = float("inf") if slow_down is None else slow_down.at_s
        self._slow_factor = 1.0 if slow_down is None else slow_down.factor
        self.overhead_s = model.overhead_s

    def factors(self, count: int) -> list[float]:
        """Noise of the next `count` iterations' forward passes, not taken yet."""
        return self._forward_noise.ahead(count)

    def take(self, count: int) -> None:
        """So many iterations have happened."""
        self._forward_noise.take(count)

    def forward_s(self, shape: ForwardShape, start_s: float, factor: float) -> float:
        """Latency of a forward pass that starts at `start_s`, with a factor from `factors`; 0 if it is empty."""
        latency_s = self._model.forward_s(shape) * factor
        return latency_s * self._slow_factor if start_s >= self._slow_at_s else latency_s

    def slice_s(self, kind: SliceKind, num_tokens: int, start_s: float) -> float:
        """Latency of a slice that starts at `start_s`; takes a noise factor.

        Raises:
            ConfigError: the profile has no measurement of this kind of slice.
        """
        latency_s = self._model.slice_s(kind, num_tokens)
        if latency_s is None:
            raise ConfigError(f"the profile knows no {kind} slices; measure it with training enabled")
        latency_s *= self._slice_noise.ahead(1)[0]
        self._slice_noise.take()
        return latency_s * self._slow_factor if start_s >= self._slow_at_s else latency_s
