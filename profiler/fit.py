"""From measured iterations to a profile: least squares on relative errors with non-negative coefficients.

A noisy machine gives outliers, nearly always too slow. Rows are weighted by 1 / measured in a first fit, then rows
whose measured / predicted is far from its median (five median absolute deviations of the log, and at least 1.5x) are
left out and the rest is fitted again with weights 1 / predicted, which unlike 1 / measured does not favour the rows
that happened to be fast. Errors are stated on held-out rows of which none was left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.batch import IterationSample
from core.errors import ProfileError
from profiler.models import LatencyModel, MemoryModel
from profiler.profile import QUANTILE_LEVELS, FitError, Origin, Profile, RawSamples
from profiler.raw import ForwardRow, SliceRow, latency_rows, spread_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Array = NDArray[Any]

_HOLD_OUT = 0.25
_MIN_FORWARD_ROWS = 12
_MIN_HOLD_OUT_ROWS = 8
"""With fewer rows of a kind none is held out."""
_TRIM_DEVIATIONS = 5.0
_TRIM_RATIO = 1.5
_REFITS = 3
_CLASSES_PER_OCTAVE = 4
"""Rows are alike if all their features are within about a fifth of each other."""
_MIN_LIKE_ROWS = 4


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What one fine-tune step held at most."""

    num_tokens: int
    """Padded tokens of its largest micro-batch."""
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class _Fit:
    coefficients: tuple[float, ...]
    error: FitError
    ratios: tuple[float, ...]
    noise: tuple[float, ...]


def fit_profile(
    samples: Sequence[IterationSample],
    origin: Origin,
    *,
    memory: Sequence[MemorySample] = (),
    kv_bytes_per_token: int | None = None,
) -> Profile:
    """Fit every model; `origin.seed` decides the hold-out split.

    Raises:
        ProfileError: fewer than a dozen forward passes were measured.
    """
    raw = spread_rows(latency_rows(samples), [(sample.num_tokens, sample.peak_bytes) for sample in memory])
    return fit_raw(raw, origin, kv_bytes_per_token=kv_bytes_per_token)


def fit_raw(raw: RawSamples, origin: Origin, *, kv_bytes_per_token: int | None = None) -> Profile:
    """Fit again from the rows of a profile.

    Raises:
        ProfileError: fewer than a dozen forward passes were measured.
    """
    import numpy as np

    if len(raw.forward) < _MIN_FORWARD_ROWS:
        raise ProfileError(f"{len(raw.forward)} forward passes are too few to fit; {_MIN_FORWARD_ROWS} are needed")
    features, latencies = _forward_matrix(raw.forward)
    forward = _fit(features, latencies, origin.seed)
    slices = {kind: _fit_slices(rows, origin.seed) for kind, rows in raw.slices.items() if rows}
    overheads = np.asarray([row[6] for row in raw.forward])
    return Profile(
        origin=origin,
        latency=LatencyModel(
            forward=_six(forward.coefficients),
            typical=_six(tuple(float(value) for value in features.max(axis=0))),
            slices={kind: (fit.coefficients[0], fit.coefficients[1]) for kind, fit in slices.items()},
        ),
        memory=_fit_memory(raw.memory, kv_bytes_per_token),
        forward_error=forward.error,
        slice_errors={kind: fit.error for kind, fit in slices.items()},
        forward_ratios=forward.ratios,
        slice_ratios={kind: fit.ratios for kind, fit in slices.items()},
        forward_noise=forward.noise,
        slice_noise={kind: fit.noise for kind, fit in slices.items()},
        overhead_s=float(np.median(overheads)),
        overhead_quantiles_s=_quantiles(overheads),
        samples=raw,
    )


def _forward_matrix(rows: Sequence[ForwardRow]) -> "tuple[_Array, _Array]":
    """Features [n, 6] and seconds [n]."""
    import numpy as np

    table = np.asarray(rows, dtype=float)
    return np.column_stack([np.ones(len(table)), table[:, :5]]), table[:, 5]


def _fit_slices(rows: Sequence[SliceRow], seed: int) -> _Fit:
    import numpy as np

    table = np.asarray(rows, dtype=float)
    tokens, latencies = table[:, 0], table[:, 1]
    if np.unique(tokens).size > 1:
        return _fit(np.column_stack([np.ones(len(table)), tokens]), latencies, seed)
    # One size only: nothing tells the constant from the slope. Halves bound both, as the online model does.
    size = tokens[0]
    fit = _fit(np.ones((len(table), 1)), latencies, seed)
    whole = fit.coefficients[0]
    halves = (whole, 0.0) if size == 0 else (whole / 2, whole / 2 / size)
    return _Fit(halves, fit.error, fit.ratios, fit.noise)


def _fit(features: "_Array", latencies: "_Array", seed: int) -> _Fit:
    """Fit on three quarters of the rows; errors on the rest, ratios over all."""
    import numpy as np

    count = len(latencies)
    order = np.random.default_rng(seed).permutation(count)
    num_held_out = int(_HOLD_OUT * count) if count >= _MIN_HOLD_OUT_ROWS else 0
    held_out, training = order[:num_held_out], order[num_held_out:]
    coefficients = _robust_fit(features[training], latencies[training])
    predicted = np.maximum(features @ coefficients, 1e-12)
    rows = held_out if num_held_out else training
    errors = np.abs(predicted[rows] / latencies[rows] - 1.0)
    error = FitError(num_rows=num_held_out, median=float(np.median(errors)), p95=float(np.quantile(errors, 0.95)))
    ratios = latencies / predicted
    return _Fit(
        tuple(float(value) for value in coefficients),
        error,
        _quantiles(ratios),
        _quantiles(_noise(features, ratios)),
    )


def _noise(features: "_Array", ratios: "_Array") -> "_Array":
    """Ratios over the median of rows that are alike; what a linear fit misses is no noise, it comes back each time."""
    import numpy as np

    like = np.round(_CLASSES_PER_OCTAVE * np.log2(1.0 + features)).astype(int)
    _, group = np.unique(like, axis=0, return_inverse=True)
    group = group.ravel()
    noise = []
    for number in range(int(group.max()) + 1):
        members = ratios[group == number]
        if len(members) >= _MIN_LIKE_ROWS:
            noise.append(members / np.median(members))
    return np.concatenate(noise) if noise else ratios


def _robust_fit(features: "_Array", latencies: "_Array") -> "_Array":
    import numpy as np

    coefficients = _least_squares(features, latencies, 1.0 / latencies)
    for _ in range(_REFITS):
        predicted = np.maximum(features @ coefficients, 1e-12)
        logs = np.log(latencies / predicted)
        centred = np.abs(logs - np.median(logs))
        bound = max(_TRIM_DEVIATIONS * float(np.median(centred)), float(np.log(_TRIM_RATIO)))
        kept = centred <= bound
        coefficients = _least_squares(features[kept], latencies[kept], 1.0 / predicted[kept])
    return coefficients


def _least_squares(features: "_Array", latencies: "_Array", weights: "_Array") -> "_Array":
    """Weighted, non-negative; columns are scaled first, because attention counts reach millions."""
    import numpy as np
    from sklearn.linear_model import LinearRegression

    rows = features * weights[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-300)
    solver = LinearRegression(positive=True, fit_intercept=False)
    solver.fit(rows / scale, latencies * weights)
    return np.where(features.max(axis=0) > 0, solver.coef_ / scale, 0.0)


def _fit_memory(rows: Sequence[tuple[int, int]], kv_bytes_per_token: int | None) -> MemoryModel:
    """An upper line: least squares through the peak of each size, then lifted over every row."""
    import numpy as np

    if not rows:
        return MemoryModel(arena_bytes=0.0, arena_bytes_per_token=0.0, kv_bytes_per_token=kv_bytes_per_token)
    table = np.asarray(rows, dtype=float)
    features = np.column_stack([np.ones(len(table)), table[:, 0]])
    constant, slope = _least_squares(features, table[:, 1], np.ones(len(table)))
    lift = max(0.0, float((table[:, 1] - constant - slope * table[:, 0]).max()))
    return MemoryModel(
        arena_bytes=float(constant) + lift,
        arena_bytes_per_token=float(slope),
        kv_bytes_per_token=kv_bytes_per_token,
    )


def _quantiles(values: "_Array") -> tuple[float, ...]:
    import numpy as np

    return tuple(float(value) for value in np.quantile(values, QUANTILE_LEVELS))


def _six(values: tuple[float, ...]) -> tuple[float, float, float, float, float, float]:
    constant, decode, context, prefill, attention, chunk = values
    return constant, decode, context, prefill, attention, chunk
