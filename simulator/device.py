"""The device of a simulated executor: the true cost of its iterations, as far as the profile knows.

Noise is drawn from the quantiles in the profile, independently for each iteration and each slice. Iterations and slices
draw from separate streams of the executor's own, one draw for each, so a run gives the same numbers whether its
iterations are simulated one by one or in a stretch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core.batch import ForwardShape
from core.errors import ConfigError
from core.types import SliceKind
from simulator.trace import SlowDown

_BLOCK = 1024
_SMALLEST = 1e-9


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution: values at levels from 0 to 1."""

    levels: Sequence[float]
    values: Sequence[float]

    @classmethod
    def exactly(cls, value: float) -> "Quantiles":
        """A distribution without spread."""
        return cls((0.0, 1.0), (value, value))


class DeviceModel(Protocol):
    """A device as its profile describes it (`simulator.hardware.ProfiledDevice` is the real one)."""

    overhead_s: float
    """Usual time of an iteration that is neither forward pass nor slices."""
    overhead_noise: Quantiles
    """Distribution of that time, in seconds."""
    forward_noise: Quantiles
    """Measured over predicted latency of forward passes."""

    def slice_noise(self, kind: SliceKind) -> Quantiles:
        """Measured over predicted latency of slices of a kind."""
        ...

    def forward_s(self, shape: ForwardShape) -> float:
        """Latency of a forward pass in seconds; 0 if it is empty."""
        ...

    def slice_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Latency of a slice in seconds; None if the profile does not know its kind."""
        ...


class NoiseStream:
    """Values drawn by inverse transform from quantiles, each used once and in order.

    Between two quantiles the logarithm is interpolated: a straight line from the 99th percentile to a single extreme
    outlier would make the tail far too heavy.
    """

    def __init__(self, quantiles: Quantiles, seed: np.random.SeedSequence) -> None:
        self._levels = np.asarray(quantiles.levels, dtype=np.float64)
        self._logs = np.log(np.maximum(np.asarray(quantiles.values, dtype=np.float64), _SMALLEST))
        self._constant = quantiles.values[0] if len(set(quantiles.values)) == 1 else None
        self._rng = np.random.default_rng(seed)
        self._drawn: list[float] = []
        self._next = 0

    def ahead(self, count: int) -> list[float]:
        """The next `count` values, without taking them."""
        while self._next + count > len(self._drawn):
            self._drawn = self._drawn[self._next :] + self._draw()
            self._next = 0
        return self._drawn[self._next : self._next + count]

    def take(self, count: int = 1) -> None:
        """Use up the next `count` values, which `ahead` has shown."""
        self._next += count

    def _draw(self) -> list[float]:
        if self._constant is not None:
            return [self._constant] * _BLOCK
        drawn: list[float] = np.exp(np.interp(self._rng.random(_BLOCK), self._levels, self._logs)).tolist()
        return drawn


class Device:
    """One executor's device: the model of it, times noise, times a slow-down from some moment on."""

    def __init__(
        self, model: DeviceModel, *, seed: np.random.SeedSequence, noise: bool, slow_down: SlowDown | None
    ) -> None:
        overhead_seed, forward_seed, *slice_seeds = seed.spawn(2 + len(SliceKind))
        self._model = model
        self._overheads = NoiseStream(
            model.overhead_noise if noise else Quantiles.exactly(model.overhead_s), overhead_seed
        )
        self._factors = NoiseStream(model.forward_noise if noise else Quantiles.exactly(1.0), forward_seed)
        self._slice_factors = {
            kind: NoiseStream(model.slice_noise(kind) if noise else Quantiles.exactly(1.0), slice_seed)
            for kind, slice_seed in zip(SliceKind, slice_seeds, strict=True)
        }
        self._slow_at_s = float("inf") if slow_down is None else slow_down.at_s
        self._slow_factor = 1.0 if slow_down is None else slow_down.factor

    def overheads_s(self, count: int) -> list[float]:
        """Overhead of the next `count` iterations, not taken yet."""
        return self._overheads.ahead(count)

    def factors(self, count: int) -> list[float]:
        """Noise of the forward passes of the next `count` iterations, not taken yet."""
        return self._factors.ahead(count)

    def take(self, count: int) -> None:
        """Use up the noise of `count` iterations, which have happened."""
        self._overheads.take(count)
        self._factors.take(count)

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
        factors = self._slice_factors[kind]
        latency_s *= factors.ahead(1)[0]
        factors.take()
        return latency_s * self._slow_factor if start_s >= self._slow_at_s else latency_s
