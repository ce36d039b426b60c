"""Bootstrap intervals, all 95 % percentile intervals with a fixed seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 4000

Interval = tuple[float, float]


def crossed_interval(values: npt.NDArray[np.float64], groups: Sequence[str]) -> Interval:
    """Of the mean of a matrix [runs, pairs]: runs and groups of pairs are drawn anew, independently.

    Args:
        values: one row for each run.
        groups: of each column. Pairs about one fact are alike, so they are drawn together.
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
    """Of sum / sum over paired units, which are drawn anew together. Infinite or nan where nothing can be said."""
    rng = np.random.default_rng(0)
    above, below = np.array(numerators, dtype=float), np.array(denominators, dtype=float)
    if not len(above):
        return float("nan"), float("nan")
    drawn = rng.integers(len(above), size=(_RESAMPLES, len(above)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = above[drawn].sum(axis=1) / below[drawn].sum(axis=1)
    return _percentiles(ratios[~np.isnan(ratios)])


def _percentiles(values: Any) -> Interval:
    """Of drawn values themselves (no interpolation): an infinite ratio must not turn its neighbours into nan."""
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5], method="nearest")
    return float(low), float(high)
