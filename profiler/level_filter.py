"""Recursive least squares of a linear latency with a fast multiplicative level: latency = level * (theta . x).

An extended Kalman filter over (log level, theta). The level walks at random, so a device that becomes twice as slow
is followed within some 15 samples for every shape, those not seen since included. Theta moves only as far as its
covariance says it is not known yet: in a direction never observed the sample teaches theta, in a known one it moves
the level. Errors are relative, so a short pass counts as much as a long one.

Forgetting cannot wind up: instead of growing by 1/lambda, the covariance relaxes towards a bound (what a coefficient
may drift by, at most the prior), however often a batch repeats. Level and theta both move by exp(gain * error), so
noise cannot push one up and the other down. Innovations are clipped (Huber): an outlier moves the level by a tenth.
"""

import math
from collections.abc import Sequence
from operator import mul

_NOISE_VARIANCE = 0.15**2
"""Of a relative error. With the walk below it sets the gain; the true noise only changes how smooth the level is."""
_LEVEL_WALK = 0.2**2 / 0.8 * _NOISE_VARIANCE
"""Variance that the log level gains with each sample: a steady gain of 0.2, an average over some ten samples."""
_RELAX = 1e-4
"""Share of the way that the covariance goes towards its bound with each sample: the inverse of theta's memory."""
_DRIFT_VARIANCE = 0.1**2
"""Bound of a learnt coefficient's relative variance: shapes change their relative cost slowly and by some 10 %."""
_DORMANT_SHARE = 1e-3
"""Of the prior variance, as the bound of a coefficient that was learnt to be zero: it may come back."""
_CLIP = 0.5
"""Largest relative innovation that a known shape may cause; 2x slower is above it, usual noise is not."""
_CLIP_SIGMAS = 3.0
_MAX_LOG_LEVEL = 9.0


class LevelFilter:
    """One linear latency with non-negative coefficients. Pure Python: an update of 7 states takes some 20 us."""

    __slots__ = ("_covariance", "_log_level", "_prior", "_theta", "coefficients")

    def __init__(self, theta: Sequence[float], deviations: Sequence[float], level_deviation: float) -> None:
        """Start from coefficients, their standard deviations, and that of the log level (0: exactly known)."""
        self._log_level = 0.0
        self._theta = [float(value) for value in theta]
        self._prior = [level_deviation**2, *(deviation**2 for deviation in deviations)]
        size = len(self._prior)
        self._covariance = [[self._prior[i] if i == j else 0.0 for j in range(size)] for i in range(size)]
        self.coefficients = tuple(self._theta)
        """Level times theta: seconds for each unit of the features, never negative."""

    def predict(self, features: Sequence[float]) -> float:
        """Expected latency in seconds."""
        latency_s: float = sum(map(mul, self.coefficients, features))
        return latency_s

    def update(self, features: Sequence[float], latency_s: float) -> None:
        """Learn from one measurement; `latency_s` is positive and finite."""
        predicted_s = self.predict(features)
        if predicted_s <= 0.0:  # every coefficient in use was clipped to zero: nothing to be relative to
            predicted_s = latency_s
        level = math.exp(self._log_level)
        gradient = [1.0, *(level * x / predicted_s for x in features)]
        projected = [sum(map(mul, row, gradient)) for row in self._covariance]
        spread = sum(map(mul, projected, gradient))
        noise = _NOISE_VARIANCE
        if spread - projected[0] > 4 * noise and latency_s < predicted_s:
            # A first guess far too high: the noise is relative to what was measured, not to the guess.
            noise *= (latency_s / predicted_s) ** 2
        variance = spread + noise
        error = latency_s / predicted_s - 1.0
        bound = max(_CLIP, _CLIP_SIGMAS * math.sqrt(variance))
        step = min(max(error, -bound), bound) / variance
        shift = step * (spread - projected[0])  # relative change of theta . x, the level's share taken out
        self._move(
            [value * step for value in projected], math.exp(shift) / (1.0 + shift) if abs(shift) < 0.5 else 1.0
        )
        self._shrink(projected, 1.0 / variance)

    def _move(self, correction: list[float], stretch: float) -> None:
        self._log_level = min(max(self._log_level + correction[0], -_MAX_LOG_LEVEL), _MAX_LOG_LEVEL)
        level = math.exp(self._log_level)
        self._theta = [max(0.0, t + c) * stretch for t, c in zip(self._theta, correction[1:], strict=True)]
        self.coefficients = tuple(level * value for value in self._theta)

    def _shrink(self, projected: list[float], precision: float) -> None:
        """What the sample has told leaves the covariance; then it relaxes towards its bound."""
        keep = 1.0 - _RELAX
        for i, row in enumerate(self._covariance):
            gain = keep * precision * projected[i]
            self._covariance[i] = row = [keep * r - gain * p for r, p in zip(row, projected, strict=True)]
            if i == 0:
                row[0] += _LEVEL_WALK
            else:
                prior = self._prior[i]
                row[i] += _RELAX * min(prior, _DRIFT_VARIANCE * self._theta[i - 1] ** 2 + _DORMANT_SHARE * prior)
