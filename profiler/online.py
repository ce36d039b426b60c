"""The latency predictor of a running engine: a profile, if there is one, corrected by every measured iteration."""

import math

from core.batch import ForwardShape, IterationSample
from core.types import SliceKind, SliceTiming
from profiler.level_filter import LevelFilter
from profiler.models import LatencyModel, forward_features
from profiler.profile import Profile
from profiler.ratio_window import RatioWindow

_MAX_LATENCY_S = 600.0
"""Anything above is a suspended process or a broken clock, not a latency."""
_OVERHEAD_SMOOTHING = 0.1
_OVERHEAD_CLIP = 4.0
_LEVEL_DEVIATION = 0.5
"""Of the log level at start with a profile: the device may be slower or faster today, at once."""
_UNSEEN_RATIO = (2.0, 2.0)
"""Seeds of the upper estimate without a profile: the first guess splits a latency in halves (constant and
proportional to tokens), so twice the guess bounds both extremes. They lose their say after some 40 samples."""


class OnlineLatencyModel:
    """`core.ports.LatencyPredictor`. Without a profile everything is unknown until it was seen once.

    The first sample of a kind is split in halves: a constant and one proportional to its tokens. A bigger batch is
    thus guessed to grow at most in proportion, a smaller one to shrink by half at most, until samples tell better.
    """

    def __init__(self, profile: Profile | None = None) -> None:
        self._forward: LevelFilter | None = None
        self._slices: dict[SliceKind, LevelFilter] = {}
        self._forward_ratios = RatioWindow(_UNSEEN_RATIO)
        self._slice_ratios: dict[SliceKind, RatioWindow] = {}
        self._overhead_s: float | None = None
        self._coefficients: tuple[float, ...] = (0.0,) * 6
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
        constant, decode, context, prefill, attention, chunk = self._coefficients
        return (
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
        return None if expected_s is None else expected_s * self._forward_ratios.upper

    def slice_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Expected latency of a slice in seconds; None if its kind was never measured."""
        model = self._slices.get(kind)
        if model is None:
            return None
        constant, per_token = model.coefficients
        return constant + per_token * num_tokens

    def slice_upper_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Latency that about 95 % of such slices stay under."""
        expected_s = self.slice_s(kind, num_tokens)
        return None if expected_s is None else expected_s * self._slice_ratios[kind].upper

    def observe(self, sample: IterationSample) -> None:
        """Learn from a measured iteration; values that cannot be latencies are ignored."""
        self._observe_forward(sample.shape, sample.forward_s)
        self._observe_overhead(sample.overhead_s)
        if (
            sample.report.slices and not sample.report.out_of_memory
        ):  # a slice that ran out of memory did not do its work
            self._observe_slices(sample.report.slices)

    def _observe_forward(self, shape: ForwardShape, latency_s: float) -> None:
        features = forward_features(shape)
        if not features[0] or not _is_latency(latency_s) or not all(0.0 <= x < math.inf for x in features):
            return
        if self._forward is None:
            self._forward = _first_forward(features, latency_s)
        else:
            self._forward_ratios.add(latency_s / max(self._forward.predict(features), 1e-12))
            self._forward.update(features, latency_s)
        self._coefficients = self._forward.coefficients

    def _observe_slices(self, timings: list[SliceTiming]) -> None:
        """Slices of one kind and size in one iteration are one sample, their mean: the cost stays bounded."""
        groups: dict[tuple[SliceKind, int], list[float]] = {}
        for timing in timings:
            if _is_latency(timing.latency_s) and 0 <= timing.num_tokens < math.inf:
                groups.setdefault((timing.kind, timing.num_tokens), []).append(timing.latency_s)
        for (kind, num_tokens), latencies_s in groups.items():
            model = self._slices.get(kind)
            if model is None:
                self._slices[kind] = _first_slice(num_tokens, latencies_s[0])
                self._slice_ratios[kind] = RatioWindow(_UNSEEN_RATIO)
                continue
            features = (1.0, float(num_tokens))
            predicted_s = max(model.predict(features), 1e-12)
            ratios = self._slice_ratios[kind]
            for latency_s in latencies_s[-_MAX_RATIOS:]:
                ratios.add(latency_s / predicted_s)
            model.update(features, sum(latencies_s) / len(latencies_s))

    def _observe_overhead(self, overhead_s: float) -> None:
        if not 0.0 <= overhead_s <= _MAX_LATENCY_S:  # false for NaN as well
            return
        if self._overhead_s is None:
            self._overhead_s = overhead_s
            return
        bounded_s = min(overhead_s, _OVERHEAD_CLIP * self._overhead_s + 1e-3)
        self._overhead_s += _OVERHEAD_SMOOTHING * (bounded_s - self._overhead_s)

    def _start_from(self, profile: Profile) -> None:
        latency = profile.latency
        self._forward = _profiled_forward(latency)
        self._coefficients = self._forward.coefficients
        self._forward_ratios = RatioWindow(profile.forward_ratios)
        for kind, coefficients in latency.slices.items():
            # Either coefficient may be wrong by a tenth; the level takes care of the rest.
            deviations = [0.1 * value + 0.01 * coefficients[0] / 64 for value in coefficients]
            self._slices[kind] = LevelFilter(coefficients, deviations, _LEVEL_DEVIATION)
            self._slice_ratios[kind] = RatioWindow(profile.slice_ratios.get(kind, _UNSEEN_RATIO))
        self._overhead_s = profile.overhead_s


_MAX_RATIOS = 16
"""Ratios of one group that enter the window: an idle engine runs many equal slices in one iteration."""


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
