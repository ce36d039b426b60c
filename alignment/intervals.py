"""Confidence bounds of a share, and of a mean."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev


def wilson(num_right: float, number: float, confidence: float) -> tuple[float, float]:
    """Lower and upper bound of a share, each one-sided at `confidence` (Wilson 1927); (0, 1) for nothing seen.

    Unlike those of the normal approximation they stay inside [0, 1].
    """
    if number <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(confidence)
    share, spread = num_right / number, z * z / number
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / number + spread / (4 * number)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Lower and upper bound of the mean of the population, each one-sided at `confidence` (Student 1908).

    They go no further than the values: of two values the formula alone would say anything.
    """
    mean = fmean(values)
    if len(values) < 2:
        return mean, mean
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    half = float(stdtrit(len(values) - 1, confidence)) * stdev(values) / math.sqrt(len(values))
    return max(min(values), mean - half), min(max(values), mean + half)
