"""What clients see, against what the engine believes: the planner's slack follows the answers as they leave the server.

The planner's own prediction ends with the engine's iteration. A client also waits for output processing, for
detokenizing, for the HTTP server, and for the CPU that training takes from these. So the executor measures time to
first token and gaps where the bytes leave, and reports them about twice a second while there is traffic. The plan made
from predictions stays the feed-forward; `EdgeController` takes from it what the reports ask for.

Each objective has a budget of misses: an observation earns what the attainment goal allows, a miss costs one. While
more is spent than was earned, each report of further misses takes a quarter of the range from the time for training,
and for gaps at least what the measured excess asks (p99 of gaps, less p99 of iterations). The time grows again slowly,
and only once the debt is paid, so the attainment over all is at the goal wherever the limit lies. Nothing is polled:
without traffic no report comes, and after a minute of silence the controller starts from the plain plan again, because
what slowed the last answers down may be gone.

Pure: `now_s` is an argument. The simulator has no edge, and so no correction.
"""

import math
from collections import deque
from collections.abc import Sequence

from core.batch import EdgeReport, IterationSample
from core.config import SloConfig

ATTAINMENT_GOAL = 0.99
"""Share of first tokens and of gaps that shall be within their targets."""
FORGET_S = 60.0
"""Silence after which the corrections are void."""
_FALL = 0.25
"""Share of the range that one overspent report takes: four of them, two seconds, take all."""
_RISE_PER_S = 0.02
"""Share of the range that a second of good answers gives back: all of it in fifty."""
_MOST_CREDIT = 1.0
"""Misses that may be saved up: a single late token changes nothing, two in a row do."""
_MOST_DEBT = 5.0
"""Misses that must be made up for at most, by 100 good observations each."""
_MOST_STEP_S = 2.0
"""A report that comes later than this after the one before counts as if it came then."""
_ITERATIONS = 512


class MissBudget:
    """How far the observations so far are within the attainment goal, as the room that training keeps.

    Invariant: `room` is within 0 and 1.
    """

    def __init__(self) -> None:
        self.room = 1.0
        """Share of the time for training that is left."""
        self._credit = 0.0

    def observe(self, num_seen: int, num_late: int, since_s: float, at_most: float = 1.0) -> None:
        """Take in `num_seen` observations, `num_late` of them misses, `since_s` seconds after the last ones.

        `at_most` bounds the room if more was spent than earned.
        """
        if num_seen <= 0:
            return
        earned = (1 - ATTAINMENT_GOAL) * num_seen - num_late
        self._credit = max(-_MOST_DEBT, min(_MOST_CREDIT, self._credit + earned))
        if self._credit < 0 and earned < 0:
            self.room = max(0.0, min(self.room - _FALL, at_most))
        elif self._credit >= 0 and not num_late:
            self.room = min(1.0, self.room + _RISE_PER_S * since_s)


class EdgeController:
    """Corrects the time that an iteration may take. See the module docstring."""

    def __init__(self, slo: SloConfig, slack_fraction: float) -> None:
        self._slack_fraction = slack_fraction
        self._gaps, self._first = MissBudget(), MissBudget()
        self._iterations_s: deque[float] = deque(maxlen=_ITERATIONS)
        self._reported_s: float | None = None
        self.slo = slo
        """The targets; they may be replaced."""

    def gap_correction_s(self, now_s: float) -> float:
        """Seconds, 0 to the whole capacity, by which an iteration with decoding requests is planned shorter."""
        self._forget(now_s)
        return (1.0 - self._gaps.room) * self._range_s

    def first_token_share(self, now_s: float) -> float:
        """Share, 0 to 1, of the slack that training may use for what clients see of times to the first token."""
        self._forget(now_s)
        return self._first.room

    def note_iteration(self, sample: IterationSample) -> None:
        """Take in an iteration of the engine, to compare the gaps with."""
        if sample.shape.num_decode:
            self._iterations_s.append(sample.forward_s + sample.overhead_s + sample.slices_s)

    def observe(self, report: EdgeReport, now_s: float) -> None:
        """Take in what clients saw since the last report."""
        self._forget(now_s)
        since_s = 0.0 if self._reported_s is None else min(_MOST_STEP_S, max(0.0, now_s - self._reported_s))
        self._reported_s = now_s
        excess_s = max(0.0, report.gap_p99_s - upper_quantile(self._iterations_s))
        fits_s = self.slo.tbt_s - excess_s  # an iteration of this length is seen as the target
        self._gaps.observe(report.num_gaps, report.num_late_gaps, since_s, max(0.0, fits_s) / self._range_s)
        self._first.observe(report.num_first, report.num_late_first, since_s)
        self._iterations_s.clear()

    @property
    def _range_s(self) -> float:
        return self._slack_fraction * self.slo.tbt_s

    def _forget(self, now_s: float) -> None:
        if self._reported_s is not None and now_s - self._reported_s > FORGET_S:
            self._gaps, self._first, self._reported_s = MissBudget(), MissBudget(), None


def upper_quantile(values: Sequence[float] | deque[float], level: float = 0.99) -> float:
    """The nearest-rank quantile, which is the largest of few values; 0 without any."""
    return sorted(values)[math.ceil(level * len(values)) - 1] if values else 0.0
