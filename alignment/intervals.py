"""Confidence bounds of a share."""

import math
from statistics import NormalDist


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
