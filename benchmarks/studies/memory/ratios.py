"""Comparisons of two settings by windows that were measured side by side."""

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.95


class Ratio(BaseModel):
    """Middle of the ratios of pairs, with its confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float
    low: float | None
    """None with too few pairs."""
    high: float | None
    num_pairs: int


def ratio_of(pairs: Sequence[tuple[float | None, float | None]], confidence: float = CONFIDENCE) -> Ratio | None:
    """First over second. Pairs in which a value is missing or not above 0 are left out; None if none is left."""
    logs = [math.log(a / b) for a, b in pairs if a is not None and b is not None and a > 0 and b > 0]
    if not logs:
        return None
    middle, low, high = center_of(logs, confidence)
    return Ratio(
        ratio=math.exp(middle),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
        num_pairs=len(logs),
    )


def center_of(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float | None, float | None]:
    """Where values lie and an interval for it, by Wilcoxon's signed ranks (Hodges and Lehmann).

    On a shared machine single windows are off by a factor; a mean would follow them. The interval is exact; it is None
    where there are too few values for it (six give 95 %, eight 99 %).
    """
    sums = np.add.outer(np.asarray(values), np.asarray(values)) / 2
    averages = np.sort(sums[np.triu_indices(len(values))])
    middle = float(np.median(averages))
    outside = _outside(len(values), (1 - confidence) / 2)
    if outside < 1:
        return middle, None, None
    return middle, float(averages[outside - 1]), float(averages[-outside])


def _outside(count: int, tail: float) -> int:
    """How many of the sorted Walsh averages an interval may leave out, and one more, on each side; 0: none."""
    ways = np.zeros(count * (count + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, count + 1):  # every rank is in the sum or not
        ways[rank:] = ways[rank:] + ways[:-rank]
    return int(np.searchsorted(np.cumsum(ways) / 2.0**count, tail, side="right"))
