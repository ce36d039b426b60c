"""The latency predictor of a running engine: a profile, if there is one, corrected by every measured iteration.

`LevelFilter` is recursive least squares of a linear latency with a fast multiplicative level: latency = level *
(theta . x), as an extended Kalman filter over (log level, theta). The level walks at random, so a device that becomes
twice as slow is followed within some 15 samples for every shape, those not seen since included. Theta moves only as far
as its covariance says it is not known yet: in a direction never observed the sample teaches theta, in a known one it
moves the level. Errors are relative, so a short pass counts as much as a long one.

Forgetting cannot wind up: instead of growing by 1/lambda, the covariance relaxes towards a bound (what a coefficient
may drift by, at most the prior), however often a batch repeats. Level and theta both move by exp(gain * error), so
noise cannot push one up and the other down. Innovations are clipped (Huber): an outlier moves the level by a tenth.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from operator import mul

from core.batch import ForwardShape, IterationSample
from core.types import SliceKind, SliceTiming
from profiler.profile import LatencyModel, Profile, forward_features

_MAX_LATENCY_S = 600.0
"""Anything above is a suspended process or a broken clock, not a latency."""
_LEVEL_DEVIATION = 0.5
"""Standard deviation of the log level at start with a profile: the device may be slower or faster today, at once."""
_UNSEEN_RATIO = (2.0, 2.0)
"""Seeds of the upper estimate without a profile: the first guess splits a latency in halves (constant and
proportional to tokens), so twice the guess bounds both extremes. They lose their say after some 40 samples."""
_WINDOW = 256
"""Ratios that the upper estimate rests on: at the quantile 0.95, on the 13 largest."""
_UPPER_LEVEL = 0.95
_MAX_RATIOS = 16
"""Ratios of one iteration that enter the window: an idle engine runs many equal slices in one iteration."""
_OVERHEAD_SMOOTHING = 0.1
_OVERHEAD_CLIP = 4.0

_NOISE_VARIANCE = 0.15**2
"""Variance of a relative error. With the walk below it sets the gain; the true noise only changes how
smooth the level is."""
_LEVEL_WALK = 0.2**2 / 0.8 * _NOISE_VARIANCE
"""Variance that the log level gains with each sample: a steady gain of 0.2, an average over some ten samples."""
_RELAX = 1e-4
"""Share of the way that the covariance goes towards its bound with each sample: the inverse of theta's memory."""
_DRIFT_VARIANCE = 0.1**2
"""Bound of a learnt coefficient's relative variance: shapes change their relative cost slowly and by some 10 %."""
_DORMANT_SHARE = 1e-3
"""Share of the prior variance that bounds a coefficient which was learnt to be zero: it may come back."""
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
        """Take out of the covariance what the sample has told, then relax it towards its bound."""
        keep = 1.0 - _RELAX
        for i, row in enumerate(self._covariance):
            gain = keep * precision * projected[i]
            self._covariance[i] = row = [keep * r - gain * p for r, p in zip(row, projected, strict=True)]
            if i == 0:
                row[0] += _LEVEL_WALK
            else:
                prior = self._prior[i]
                row[i] += _RELAX * min(prior, _DRIFT_VARIANCE * self._theta[i - 1] ** 2 + _DORMANT_SHARE * prior)


class RatioWindow:
    """Exact running quantile of measured / predicted; seeds (a profile's quantiles) are pushed out as ratios come."""

    def __init__(self, seeds: Iterable[float]) -> None:
        self._in_order = deque(seeds)
        self._sorted = sorted(self._in_order)
        self.upper = self._quantile()
        """The quantile, at least 1, so that an upper estimate is never below the mean."""

    def add(self, ratio: float) -> None:
        """Take in one ratio, and forget the oldest if the window is full."""
        if len(self._in_order) >= _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._in_order.popleft())]
        self._in_order.append(ratio)
        insort(self._sorted, ratio)
        self.upper = self._quantile()

    def _quantile(self) -> float:
        count = len(self._sorted)
        return max(1.0, self._sorted[min(count - 1, int(_UPPER_LEVEL * (count + 1)))])


class _Latency:
    """One latency: its model, and how far measurements come above it."""

    def __init__(self, model: LevelFilter, ratios: Iterable[float] = _UNSEEN_RATIO) -> None:
        self.model = model
        self.ratios = RatioWindow(ratios)

    def observe(self, features: Sequence[float], latencies_s: Sequence[float]) -> None:
        """Learn from measurements of equal work in one iteration: one sample, their mean."""
        predicted_s = max(self.model.predict(features), 1e-12)
        for latency_s in latencies_s[-_MAX_RATIOS:]:
            self.ratios.add(latency_s / predicted_s)
        self.model.update(features, sum(latencies_s) / len(latencies_s))


class OnlineLatencyModel:
    """`core.ports.LatencyPredictor`. Without a profile everything is unknown until it was seen once.

    The first sample of a kind is split in halves: a constant and one proportional to its tokens. A bigger batch is
    thus guessed to grow at most in proportion, a smaller one to shrink by half at most, until samples tell better.
    """

    def __init__(self, profile: Profile | None = None) -> None:
        self._forward: _Latency | None = None
        self._slices: dict[SliceKind, _Latency] = {}
        self._overhead_s: float | None = None
        if profile is not None:
            self._start_from(profile)

    @property
    def overhead_s(self) -> float:
        """Expected time of an iteration that is neither forward pass nor slices; 0 before the first iteration."""
        return self._overhead_s or 0.0

    def forward_s(self, shape: ForwardShape) -> float | None:
        """Expected latency in seconds; 0 for an empty shape, None before the first forward pass without profile."""
        num_decode, num_prefill_tokens = shape.num_decode, shape.num_prefill_tokens
        if not num_decode and not num_prefill_tokens:
            return 0.0
        if self._forward is None:
            return None
        constant, decode, context, prefill, attention, chunk = self._forward.model.coefficients
        return (  # written out: planning asks dozens of times in an iteration
            constant
            + decode * num_decode
            + context * shape.decode_context
            + prefill * num_prefill_tokens
            + attention * shape.prefill_attention
            + chunk * shape.num_prefills
        )

    def forward_upper_s(self, shape: ForwardShape) -> float | None:
        """Latency that about 95 % of such forward passes stay under."""
        expected_s = self.forward_s(shape)
        return (
            expected_s if self._forward is None or expected_s is None else expected_s * self._forward.ratios.upper
        )

    def slice_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Expected latency of a slice in seconds; None if its kind was never measured."""
        known = self._slices.get(kind)
        if known is None:
            return None
        constant, per_token = known.model.coefficients
        return constant + per_token * num_tokens

    def slice_upper_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Latency that about 95 % of such slices stay under."""
        expected_s = self.slice_s(kind, num_tokens)
        return None if expected_s is None else expected_s * self._slices[kind].ratios.upper

    def observe(self, sample: IterationSample) -> None:
        """Learn from a measured iteration; values that cannot be latencies are ignored."""
        self._observe_forward(sample.shape, sample.forward_s)
        self._observe_overhead(sample.overhead_s)
        if sample.report.slices and not sample.report.out_of_memory:  # a slice that ran out did not do its work
            self._observe_slices(sample.report.slices)

    def _observe_forward(self, shape: ForwardShape, latency_s: float) -> None:
        features = forward_features(shape)
        if not features[0] or not _is_latency(latency_s) or not all(0.0 <= x < math.inf for x in features):
            return
        if self._forward is None:
            self._forward = _Latency(_first_forward(features, latency_s))
        else:
            self._forward.observe(features, [latency_s])

    def _observe_slices(self, timings: list[SliceTiming]) -> None:
        """Slices of one kind and size in one iteration are one sample, their mean: the cost stays bounded."""
        groups: dict[tuple[SliceKind, int], list[float]] = {}
        for timing in timings:
            if _is_latency(timing.latency_s) and 0 <= timing.num_tokens < math.inf:
                groups.setdefault((timing.kind, timing.num_tokens), []).append(timing.latency_s)
        for (kind, num_tokens), latencies_s in groups.items():
            if kind in self._slices:
                self._slices[kind].observe((1.0, float(num_tokens)), latencies_s)
            else:
                self._slices[kind] = _Latency(_first_slice(num_tokens, latencies_s[0]))

    def _observe_overhead(self, overhead_s: float) -> None:
        if not 0.0 <= overhead_s <= _MAX_LATENCY_S:  # false for NaN as well
            return
        if self._overhead_s is None:
            self._overhead_s = overhead_s
            return
        bounded_s = min(overhead_s, _OVERHEAD_CLIP * self._overhead_s + 1e-3)
        self._overhead_s += _OVERHEAD_SMOOTHING * (bounded_s - self._overhead_s)

    def _start_from(self, profile: Profile) -> None:
        self._forward = _Latency(_profiled_forward(profile.latency), profile.forward_ratios)
        for kind, coefficients in profile.latency.slices.items():
            # Either coefficient may be wrong by a tenth; the level takes care of the rest.
            deviations = [0.1 * value + 0.01 * coefficients[0] / 64 for value in coefficients]
            model = LevelFilter(coefficients, deviations, _LEVEL_DEVIATION)
            self._slices[kind] = _Latency(model, profile.slice_ratios.get(kind, _UNSEEN_RATIO))
        self._overhead_s = profile.overhead_s


def _is_latency(value_s: float) -> bool:
    return 0.0 < value_s <= _MAX_LATENCY_S  # false for NaN as well


def _first_forward(features: tuple[float, ...], latency_s: float) -> LevelFilter:
    """Halves: constant, and proportional to tokens, decode or prefill alike. Attention starts at zero, but open."""
    token_s = latency_s / (features[1] + features[3])
    theta = [latency_s / 2, token_s / 2, 0.0, token_s / 2, 0.0, 0.0]
    # One token of context is far cheaper than one token of work: a key is read, no weight is multiplied.
    deviations = [latency_s, token_s, token_s / 100, token_s, token_s / 100, latency_s / 4]
    model = LevelFilter(theta, deviations, 0.0)
    model.update(features, latency_s)  # exact already; this tells the covariance that the sum is known
    return model


def _first_slice(num_tokens: int, latency_s: float) -> LevelFilter:
    if num_tokens == 0:
        return LevelFilter([latency_s, 0.0], [latency_s, 0.0], 0.0)
    model = LevelFilter([latency_s / 2, latency_s / 2 / num_tokens], [latency_s, latency_s / num_tokens], 0.0)
    model.update((1.0, float(num_tokens)), latency_s)
    return model


def _profiled_forward(latency: LatencyModel) -> LevelFilter:
    """Each coefficient may be wrong by a tenth, and by what makes 5 % of a large pass at the far end of the grid."""
    large_s = sum(c * x for c, x in zip(latency.forward, latency.typical, strict=True))
    deviations = [
        0.1 * coefficient + (0.05 * large_s / reach if reach > 0 else 0.0)
        for coefficient, reach in zip(latency.forward, latency.typical, strict=True)
    ]
    deviations[0] = 0.1 * latency.forward[0] + 0.01 * large_s
    return LevelFilter(latency.forward, deviations, _LEVEL_DEVIATION)
