"""Does a number grow? For resident memory over hours, which moves in steps and is no white noise."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

_BLOCKS = 20
"""Means of so many stretches of time are compared, not single readings, which depend on their neighbours."""

MAX_GROWTH_PER_HOUR = 0.01
"""Share of its size by which a flat process may at most be growing."""


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
        """Whether it is not shown to grow, or surely grows by less than `MAX_GROWTH_PER_HOUR`."""
        return self.low <= 0 or self.high <= MAX_GROWTH_PER_HOUR * self.last_bytes


def trend_of(times_s: Sequence[float], sizes: Sequence[float]) -> Trend | None:
    """The trend after the first third, in which caches fill; None of fewer than `_BLOCKS` readings there."""
    from scipy import stats

    times, values = np.asarray(times_s, dtype=float), np.asarray(sizes, dtype=float)
    later = times >= times[0] + (times[-1] - times[0]) / 3 if len(times) else np.zeros(0, dtype=bool)
    times, values = times[later], values[later]
    if len(times) < _BLOCKS:
        return None
    hours = np.array([part.mean() for part in np.array_split(times, _BLOCKS)]) / 3600
    means = np.array([part.mean() for part in np.array_split(values, _BLOCKS)])
    slope, _, low, high = stats.theilslopes(means, hours, alpha=0.95)
    return Trend(
        first_bytes=float(means[0]),
        last_bytes=float(means[-1]),
        bytes_per_hour=float(slope),
        low=float(low),
        high=float(high),
    )
