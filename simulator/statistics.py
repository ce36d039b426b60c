"""Measurements of a run: latencies in log-spaced histograms, attainment, and work over virtual time.

Iterations are counted by the million, so nothing is kept for each token or request. A histogram's bin is 0.5 % wide;
a percentile is the middle of its bin.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from core.config import SloConfig
from scheduler.offload import Placement
from simulator.running import SimRequest
from simulator.trace import Trace

_BINS_PER_E = 200
_SMALLEST_S = 1e-7


class Histogram:
    """Seconds with weights, by logarithm."""

    __slots__ = ("_counts", "max_s", "total", "total_s")

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
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
        """Value in seconds that `percent` of the events do not exceed; None if there are none."""
        if not self.total:
            return None
        wanted = math.ceil(self.total * percent / 100)
        index = next(index for index, seen in self._cumulative() if seen >= wanted)
        return min(math.exp((index + 0.5) / _BINS_PER_E), self.max_s)

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
        self._counts.update(other._counts)  # noqa: SLF001 - of the same class
        self.total += other.total
        self.total_s += other.total_s
        self.max_s = max(self.max_s, other.max_s)

    def cdf(self) -> tuple[list[float], list[float]]:
        """Upper ends of the bins in seconds, and the share of events up to each."""
        rows = list(self._cumulative())
        return [math.exp((index + 1) / _BINS_PER_E) for index, _ in rows], [seen / self.total for _, seen in rows]

    def _cumulative(self) -> Iterator[tuple[int, int]]:
        """Each bin that is not empty, with the number of events up to its end."""
        bins = sorted(self._counts)
        return zip(bins, itertools.accumulate(self._counts[index] for index in bins), strict=True)


@dataclass(slots=True)
class ClassCount:
    """One request class."""

    ttft: Histogram = field(default_factory=Histogram)
    finished: int = 0
    attained: int = 0


class Statistics:
    """Filled by the executors, read at the end. One object for the whole cluster."""

    def __init__(self, slo: SloConfig, bucket_s: float) -> None:
        self.slo = slo
        self.tbt = Histogram()
        self.classes = {"interactive": ClassCount(), "background": ClassCount()}
        self.bucket_s = bucket_s
        self.forward_s = 0.0
        self.slices_s = 0.0
        self.moved_s = 0.0
        """Those of `slices_s` that the CPU ran beside the engine's device."""
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

    def class_of(self, request: SimRequest) -> ClassCount:
        """The counts that a request belongs to."""
        return self.classes["background" if request.user_priority > 0 else "interactive"]

    def add_gap(self, gap_s: float, weight: int) -> bool:
        """Count a token of `weight` requests, `gap_s` after the one before; returns True if that was too late."""
        self.tbt.add(gap_s, weight)
        self.output_tokens += weight
        if gap_s <= self.slo.tbt_s:
            return False
        self.late_tokens += weight
        return True

    def add_work(self, start_s: float, end_s: float, forward_s: float, slices_s: float) -> None:
        """Count the seconds that an iteration, or a run of them, kept the device busy between two moments."""
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


Log = Callable[[str, str, int], None]
"""Event, subject (a request's id, or a number), executor."""


class TokenMeter:
    """Takes the times at which tokens come out of one executor, for all decoding requests at once.

    They all get a token in the same passes, so the gap between two passes is the gap between two tokens of each, and a
    request was late if a pass after its first token was.
    """

    def __init__(self, executor: int, statistics: Statistics, log: Log | None) -> None:
        self.finished: list[SimRequest] = []
        """Requests that ended since this list was last emptied."""
        self._executor = executor
        self._statistics = statistics
        self._log = log
        self._last_token_s = 0.0
        self._last_late_s = -1.0

    def decoded(self, end_s: float, num_decode: int) -> None:
        """Count a forward pass that gave every decoding request a token."""
        if self._statistics.add_gap(end_s - self._last_token_s, num_decode):
            self._last_late_s = end_s
        self._last_token_s = end_s

    def computed(self, end_s: float, num_prompt_tokens: int) -> None:
        """Count a forward pass that computed prompt tokens."""
        self._statistics.prompt_tokens += num_prompt_tokens
        self._last_token_s = end_s

    def prompt_done(self, request: SimRequest, end_s: float) -> None:
        """Count the token that follows a prompt (computed anew, after a preemption)."""
        if request.first_token_s < 0:
            request.first_token_s = end_s
            self._statistics.class_of(request).ttft.add(end_s - request.arrival_s)
            self._statistics.output_tokens += 1
            self._note("first_token", request.request_id)
        elif self._statistics.add_gap(end_s - request.last_token_s, 1):
            request.is_late = True
        request.late_since_s = end_s

    def preempted(self, request: SimRequest) -> None:
        """Count a request that lost its seat; its lateness until now stays with it."""
        self._statistics.preemptions += 1
        if request.generated:
            request.last_token_s = self._last_token_s
            request.is_late |= self._last_late_s > request.late_since_s
        self._note("preempted", request.request_id)

    def pruned(self, num_blocks: int) -> None:
        """Count dropped KV blocks."""
        self._statistics.pruned_blocks += num_blocks
        self._note("pruned", str(num_blocks))

    def ended(self, request: SimRequest) -> None:
        """Count a request whose last token is out."""
        is_late = request.is_late or self._last_late_s > request.late_since_s
        is_prompt = request.first_token_s - request.arrival_s <= self._statistics.slo.ttft_s
        count = self._statistics.class_of(request)
        count.finished += 1
        count.attained += is_prompt and not is_late
        self.finished.append(request)
        self._note("finished", request.request_id)

    def trained(self, end_s: float, num_pairs: int) -> None:
        """Count the pairs of optimizer steps that ended."""
        self._statistics.pairs += num_pairs
        self._statistics.pairs_per_bucket[int(end_s / self._statistics.bucket_s)] += num_pairs
        self._note("trained", str(num_pairs))

    def _note(self, event: str, subject: str) -> None:
        """Write a line of the event log, if there is one."""
        if self._log is not None:
            self._log(event, subject, self._executor)


@dataclass(frozen=True, slots=True)
class Result:
    """One run. Rates are over `virtual_s`, the time until the last request (or the trace) ended."""

    trace: Trace
    num_requests: int
    virtual_s: float
    statistics: Statistics
    placement: Placement
    """Where AdamW ran, and the reason."""
    can_move: bool
    """The profile knows it on two devices."""

    @property
    def ttft(self) -> Histogram:
        """TTFT of all classes."""
        merged = Histogram()
        for count in self.statistics.classes.values():
            merged.include(count.ttft)
        return merged

    @property
    def num_finished(self) -> int:
        """Requests that got their last token."""
        return sum(count.finished for count in self.statistics.classes.values())

    @property
    def slo_attainment(self) -> float | None:
        """Share of requests with TTFT and every TBT within the targets; None without requests."""
        attained = sum(count.attained for count in self.statistics.classes.values())
        return attained / self.num_finished if self.num_finished else None

    @property
    def pairs_per_s(self) -> float:
        """Preference pairs of finished optimizer steps."""
        return self.statistics.pairs / self.virtual_s

    @property
    def utilisation(self) -> float:
        """Share of virtual time that forward passes and slices take."""
        return self._share(self.statistics.forward_s + self.statistics.slices_s)

    def energy(self) -> dict[str, float | None] | None:
        """Mean power of all executors; joules over idle per 1,000 generated tokens and per pair. None without power."""
        found, power = self.statistics, self.trace.power
        if power is None:
            return None
        spent = power.spent(self.virtual_s * self.trace.executors, found.forward_s, found.slices_s, found.moved_s)
        tokens, pairs = found.output_tokens, found.pairs
        return {
            "mean_w": spent.total_j / self.virtual_s,
            "joules_per_1000_tokens": 1000 * spent.serving_j / tokens if tokens else None,
            "joules_per_pair": spent.training_j / pairs if pairs else None,
        }

    def to_json(self) -> dict[str, Any]:
        """Built-in types only; the same for the same trace, profile and seed."""
        found = self.statistics
        return {
            "trace": self.trace.name,
            "policy": self.trace.args.scheduler.policy,
            "seed": self.trace.seed,
            "executors": self.trace.executors,
            "requests": self.num_requests,
            "finished": self.num_finished,
            "virtual_s": self.virtual_s,
            "slo_attainment": self.slo_attainment,
            "ttft": self.ttft.summary(),
            "tbt": found.tbt.summary(),
            "late_tokens": found.late_tokens,
            "classes": {
                name: {
                    "requests": count.finished,
                    "slo_attainment": count.attained / count.finished,
                    "ttft": count.ttft.summary(),
                }
                for name, count in found.classes.items()
                if count.finished
            },
            "pairs": found.pairs,
            "pairs_per_s": self.pairs_per_s,
            "output_tokens_per_s": found.output_tokens / self.virtual_s,
            "prompt_tokens_per_s": found.prompt_tokens / self.virtual_s,
            "utilisation": self.utilisation,
            "forward_share": self._share(found.forward_s),
            "slices_share": self._share(found.slices_s),
            "iterations": found.iterations,
            "slices": found.slices,
            "preemptions": found.preemptions,
            "pruned_blocks": found.pruned_blocks,
            "energy": self.energy(),
            "optimizer": {"place": self.placement.place, "reason": self.placement.reason},
        }

    def _share(self, busy_s: float) -> float:
        return busy_s / (self.virtual_s * self.trace.executors)
