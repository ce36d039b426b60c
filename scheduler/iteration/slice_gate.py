"""May this slice start in what is left of the iteration's budget? The worker's last word on every slice.

The planner gives a budget in seconds; the gate holds the slices to it by their upper estimates, with measurements
of the very slices it admits. Shared with the simulator.
"""

from core.types import SliceKind
from scheduler.iteration.estimator import SliceEstimator

BLOCKED_BEFORE_RELAX = 8
"""Iterations in which an estimate keeps a slice out before its slowest measurement is forgotten."""


class SliceGate:
    """Upper estimates by kind and size, and the count of iterations that they kept everything out."""

    def __init__(self) -> None:
        self._estimator = SliceEstimator()
        self._blocked = 0

    def fits(self, kind: SliceKind, num_tokens: int, left_s: float, *, first: bool) -> bool:
        """Whether the slice's upper estimate is within `left_s`; unknown kinds never fit.

        Args:
            kind: what the slice does.
            num_tokens: its size, as in `SliceSpec`.
            left_s: what is left of the iteration's budget, in seconds.
            first: no slice ran in this iteration yet. Only such refusals count as "kept out": an outlier among the
                measurements must not bar a kind for ever.
        """
        predicted_s = self._estimator.predict(kind, num_tokens)
        fits = predicted_s is not None and predicted_s <= left_s
        if fits:
            self._blocked = 0
        elif first:
            self._blocked += 1
            if self._blocked % BLOCKED_BEFORE_RELAX == 0:
                self._estimator.relax(kind, num_tokens)
        return fits

    def observe(self, kind: SliceKind, num_tokens: int, latency_s: float) -> None:
        """Take in one measured slice."""
        self._estimator.observe(kind, num_tokens, latency_s)
