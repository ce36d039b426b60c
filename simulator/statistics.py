"""What a run measured: latencies in log-spaced histograms, attainment, and work over virtual time.

Iterations are counted by the million, so nothing is kept for each token or request. A histogram's bin is 0.5 % wide;
a percentile is the middle of its bin.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field

from core.config import SloConfig

_BINS_PER_E = 200
_SMALLEST_S = 1e-7


class Histogram:
    """Seconds with weights, by logarithm."""

    __slots__ = ("_counts", "max_s", "total", "total_s")

    def __init__(self) -> None:
        self._counts: defaultdict[int, int] = defaultdict(int)
        self.total = 0
        self.total_s = 0.0
        self.max_s = 0.0

    def add(self, value_s: float, weight: int = 1) -> None:
        """Count `weight` events of this duration."""
        self._counts[math.floor(math.log(max(value_s, _SMALLEST_S)) * _BINS_PER_E)] += weight
        self.total += weight
        self.total_s += value_s * weight
        if value_s > self.max_s:
            self.max_s = value_s

    def percentile(self, percent: float) -> float | None:
        """The value in seconds that `percent` of the events do not exceed; None if there are none."""
        if not self.total:
            return None
        wanted = math.ceil(self.total * percent / 100)
        seen = 0
        for index in sorted(self._counts):
            seen += self._counts[index]
            if seen >= wanted:
                return min(math.exp((index + 0.5) / _BINS_PER_E), self.max_s)
        return self.max_s

    def summary(self) -> dict[str, float | int | None]:
        """Count, mean, p50, p90, p99 and maximum, in seconds."""
        return {
            "count": self.total,
            "mean_s": self.total_s / self.total if self.total else None,
            **{f"p{percent}_s": self.percentile(percent) for percent in (50, 90, 99)},
            "max_s": self.max_s if self.total else None,
        }

    def include(self, other: "Histogram") -> None:
        """Add another histogram's events to this one."""
        for index, count in other._counts.items():
            self._counts[index] += count
        self.total += other.total
        self.total_s += other.total_s
        self.max_s = max(self.max_s, other.max_s)

    def cdf(self) -> tuple[list[float], list[float]]:
        """Upper ends of the bins in seconds, and the share of events up to each."""
        seen = 0
        ends, shares = [], []
        for index in sorted(self._counts):
            seen += self._counts[index]
            ends.append(math.exp((index + 1) / _BINS_PER_E))
            shares.append(seen / self.total)
        return ends, shares


@dataclass(slots=True)
class ClassCount:
    """One request class."""

    ttft: Histogram = field(default_factory=Histogram)
    finished: int = 0
    attained: int = 0


class Statistics:
    """Filled by the executors, read at the end. One object for the whole cluster."""

    def __init__(self, slo: SloConfig, bucket_s: float) -> None:
        self.tbt = Histogram()
        self.classes = {"interactive": ClassCount(), "background": ClassCount()}
        self.bucket_s = bucket_s
        self.forward_s = 0.0
        self.slices_s = 0.0
        self.iterations = 0
        self.slices = 0
        self.preemptions = 0
        self.pruned_blocks = 0
        self.output_tokens = 0
        self.prompt_tokens = 0
        self.pairs = 0
        self.late_tokens = 0
        """Tokens that came later after the one before than the TBT target."""
        self.forward_per_bucket: defaultdict[int, float] = defaultdict(float)
        self.slices_per_bucket: defaultdict[int, float] = defaultdict(float)
        self.pairs_per_bucket: defaultdict[int, int] = defaultdict(int)
        self._slo = slo

    def add_gap(self, gap_s: float, weight: int) -> bool:
        """`weight` requests got a token so long after the one before; returns whether that was too late."""
        self.tbt.add(gap_s, weight)
        self.output_tokens += weight
        if gap_s <= self._slo.tbt_s:
            return False
        self.late_tokens += weight
        return True

    def add_first_token(self, ttft_s: float, *, is_background: bool) -> None:
        """A request's first token is out."""
        self.classes["background" if is_background else "interactive"].ttft.add(ttft_s)
        self.output_tokens += 1

    def add_finished(self, ttft_s: float, *, is_late: bool, is_background: bool) -> None:
        """A request is done; `is_late`: some token of it missed the TBT target."""
        count = self.classes["background" if is_background else "interactive"]
        count.finished += 1
        if ttft_s <= self._slo.ttft_s and not is_late:
            count.attained += 1

    def add_work(self, start_s: float, end_s: float, forward_s: float, slices_s: float) -> None:
        """An iteration, or a run of them, kept the device busy for so long between these moments."""
        self.forward_s += forward_s
        self.slices_s += slices_s
        first, last = int(start_s / self.bucket_s), int(end_s / self.bucket_s)
        for bucket in range(first, last + 1):
            share = 1.0
            if first != last:
                inside_s = min(end_s, (bucket + 1) * self.bucket_s) - max(start_s, bucket * self.bucket_s)
                share = inside_s / (end_s - start_s)
            self.forward_per_bucket[bucket] += share * forward_s
            self.slices_per_bucket[bucket] += share * slices_s

    def add_pairs(self, end_s: float, num_pairs: int) -> None:
        """An optimizer step ended."""
        self.pairs += num_pairs
        self.pairs_per_bucket[int(end_s / self.bucket_s)] += num_pairs
