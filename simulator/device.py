"""The device of a simulated executor: the true cost of its iterations, as far as the profile knows.

Noise is drawn from the quantiles in the profile, independently for each iteration and each slice. Iterations and slices
draw from separate streams of the executor's own, one draw for each, so a run gives the same numbers whether its
iterations are simulated one by one or in a stretch.
"""

from collections.abc import Sequence

import numpy as np

from core.batch import ForwardShape
from core.errors import ConfigError
from core.types import SliceKind
from profiler.online import OnlineLatencyModel
from profiler.profile import QUANTILE_LEVELS, Profile
from simulator.trace import SlowDown

_BLOCK = 1024
_SMALLEST = 1e-9
_NO_NOISE = (1.0,)


class NoiseStream:
    """Values drawn by inverse transform from quantiles at `QUANTILE_LEVELS`, each used once and in order.

    Between two quantiles the logarithm is interpolated: a straight line from the 99th percentile to a single extreme
    outlier would make the tail far too heavy.
    """

    def __init__(self, quantiles: Sequence[float], seed: np.random.SeedSequence) -> None:
        """`quantiles` may be a single value: a distribution without spread."""
        self._constant = quantiles[0] if len(set(quantiles)) == 1 else None
        self._logs = np.log(np.maximum(np.asarray(quantiles, dtype=np.float64), _SMALLEST))
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
        drawn: list[float] = np.exp(np.interp(self._rng.random(_BLOCK), QUANTILE_LEVELS, self._logs)).tolist()
        return drawn


class Device:
    """One executor's device: the profile's model, times noise, times a slow-down from some moment on."""

    def __init__(
        self, profile: Profile, *, seed: np.random.SeedSequence, noise: bool, slow_down: SlowDown | None
    ) -> None:
        overhead_seed, forward_seed, *slice_seeds = seed.spawn(2 + len(SliceKind))
        self._model = OnlineLatencyModel(profile)  # learns nothing here: the profile's model in its fast form
        self.overheads = NoiseStream(
            profile.overhead_quantiles_s if noise else (profile.overhead_s,), overhead_seed
        )
        """Overheads of the coming iterations, in seconds."""
        self.factors = NoiseStream(profile.forward_noise if noise else _NO_NOISE, forward_seed)
        """Noise of the coming iterations' forward passes."""
        slice_noise = profile.slice_noise if noise else {}
        self._slice_factors = {
            kind: NoiseStream(slice_noise.get(kind, _NO_NOISE), slice_seed)
            for kind, slice_seed in zip(SliceKind, slice_seeds, strict=True)
        }
        self._slow_down = slow_down

    def take(self, count: int) -> None:
        """Use up the overheads and the noise of `count` iterations, which have happened."""
        self.overheads.take(count)
        self.factors.take(count)

    def forward_s(self, shape: ForwardShape, start_s: float, factor: float) -> float:
        """Latency of a forward pass that starts at `start_s`, with a factor from `factors`; 0 if it is empty."""
        latency_s = (self._model.forward_s(shape) or 0.0) * factor
        return latency_s * self._slowness(start_s)

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
        return latency_s * self._slowness(start_s)

    def _slowness(self, start_s: float) -> float:
        slow_down = self._slow_down
        if slow_down is None or start_s < slow_down.at_s:
            return 1.0
        since_s = start_s - slow_down.at_s
        share = 1.0 if since_s >= slow_down.over_s else since_s / slow_down.over_s
        return 1.0 + (slow_down.factor - 1.0) * share
