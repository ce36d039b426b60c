"""Statistics of measurements: percentiles, shares, ratios with intervals, trends, and bootstrap intervals.

Intervals are of 95 % confidence unless a caller says otherwise. The bootstrap ones are percentile intervals with a
fixed seed, so that a report of the same data is the same text.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.95
_RESAMPLES = 4000
_STRETCHES = 20
"""A trend compares the means of so many stretches of time, not single readings, which depend on their neighbours."""
_MAX_GROWTH_PER_HOUR = 0.01
"""Share of its size by which a flat process may at most be growing."""

Interval = tuple[float, float]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Interpolate between order statistics (numpy's default); None of nothing."""
    return float(np.percentile(values, percent)) if values else None


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean, for truth values the share of true ones; None of nothing."""
    known = list(values)
    return sum(known) / len(known) if known else None


def latency_summary(values_s: Sequence[float]) -> dict[str, float | int | None]:
    """Count, mean, p50, p90, p99 and maximum, in seconds."""
    quantiles = {f"p{percent}_s": percentile(values_s, percent) for percent in (50, 90, 99)}
    return {"count": len(values_s), "mean_s": mean(values_s), **quantiles, "max_s": max(values_s, default=None)}


class Ratio(BaseModel):
    """Middle of the ratios of pairs, with its confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float
    low: float | None
    """None with too few pairs."""
    high: float | None
    num_pairs: int


def ratio_of(pairs: Sequence[tuple[float | None, float | None]], confidence: float = CONFIDENCE) -> Ratio | None:
    """First over second of each pair, of windows that were measured side by side.

    Pairs in which a value is missing or not above 0 are left out; None if none is left.
    """
    logs = [math.log(a / b) for a, b in pairs if a is not None and b is not None and a > 0 and b > 0]
    if not logs:
        return None
    middle, *bounds = center_of(logs, confidence)
    low, high = (None if bound is None else math.exp(bound) for bound in bounds)
    return Ratio(ratio=math.exp(middle), low=low, high=high, num_pairs=len(logs))


def center_of(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float | None, float | None]:
    """Estimate where values lie, with an interval, by Wilcoxon's signed ranks (Hodges and Lehmann).

    On a shared machine single windows are off by a factor; a mean would follow them. The interval is exact; it is None
    where there are too few values for it (six give 95 %, eight 99 %).
    """
    sums = np.add.outer(np.asarray(values), np.asarray(values)) / 2
    averages = np.sort(sums[np.triu_indices(len(values))])
    middle = float(np.median(averages))
    # Of the sorted Walsh averages, an interval leaves out all before the `outside`-th from each end.
    ways = np.zeros(len(averages) + 1)
    ways[0] = 1.0
    for rank in range(1, len(values) + 1):  # every rank is in the sum or not
        ways[rank:] = ways[rank:] + ways[:-rank]
    outside = int(np.searchsorted(np.cumsum(ways) / 2.0 ** len(values), (1 - confidence) / 2, side="right"))
    if outside < 1:
        return middle, None, None
    return middle, float(averages[outside - 1]), float(averages[-outside])


class Trend(BaseModel):
    """Slope of the last two thirds of a series (Theil and Sen's), with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_bytes: float
    last_bytes: float
    bytes_per_hour: float
    low: float
    high: float

    @property
    def is_flat(self) -> bool:
        """True if it is not shown to grow, or surely grows by less than `_MAX_GROWTH_PER_HOUR`."""
        return self.low <= 0 or self.high <= _MAX_GROWTH_PER_HOUR * self.last_bytes


def trend_of(times_s: Sequence[float], sizes: Sequence[float]) -> Trend | None:
    """Estimate how fast resident memory grows, which moves in steps and is no white noise.

    The first third, in which caches fill, is left out; None of fewer than `_STRETCHES` readings after it.
    """
    from scipy import stats

    times, values = np.asarray(times_s, dtype=float), np.asarray(sizes, dtype=float)
    later = times >= times[0] + (times[-1] - times[0]) / 3 if len(times) else np.zeros(0, dtype=bool)
    times, values = times[later], values[later]
    if len(times) < _STRETCHES:
        return None
    hours = np.array([part.mean() for part in np.array_split(times, _STRETCHES)]) / 3600
    means = np.array([part.mean() for part in np.array_split(values, _STRETCHES)])
    slope, _, low, high = stats.theilslopes(means, hours, alpha=CONFIDENCE)
    return Trend(first_bytes=means[0], last_bytes=means[-1], bytes_per_hour=slope, low=low, high=high)


def crossed_interval(values: npt.NDArray[np.float64], groups: Sequence[str]) -> Interval:
    """Interval of the mean of a matrix [runs, pairs]: runs and groups of pairs are drawn anew, independently.

    `groups` has one for each column. Pairs about one fact are alike, so they are drawn together.
    """
    rng = np.random.default_rng(0)
    names, group = np.unique(np.array(groups), return_inverse=True)
    sizes = np.bincount(group)
    sums = np.stack([np.bincount(group, weights=row) for row in values])  # [runs, groups]
    # How often each run and each group is drawn; [resamples, runs] and [resamples, groups].
    runs = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=_RESAMPLES)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=_RESAMPLES)
    return _percentiles(((runs @ sums) * drawn).sum(axis=1) / (len(values) * (drawn @ sizes)))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Interval of sum / sum over paired units, drawn anew together; infinite or nan where nothing can be said."""
    above, below = np.array(numerators, dtype=float), np.array(denominators, dtype=float)
    if not len(above):
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(len(above), size=(_RESAMPLES, len(above)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = above[drawn].sum(axis=1) / below[drawn].sum(axis=1)
    return _percentiles(ratios[~np.isnan(ratios)])


def _percentiles(values: Any) -> Interval:
    """Take drawn values themselves (no interpolation): an infinite ratio must not turn its neighbours into nan."""
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5], method="nearest")
    return float(low), float(high)
