"""Running quantile of measured / predicted: how far above its prediction a latency may come."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

_WINDOW = 256
"""At a level of 0.95 the quantile rests on the 13 largest ratios."""


class RatioWindow:
    """Quantile of the last ratios, exact. Seeds (a profile's quantiles) are pushed out as ratios come in."""

    def __init__(self, seeds: Iterable[float], level: float = 0.95) -> None:
        self._level = level
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
        rank = min(count - 1, int(self._level * (count + 1)))
        return max(1.0, self._sorted[rank])
