"""A slice's latency by its kind and tokens, learnt from every measured slice.

It starts from nothing ("unknown" is None, never a constant that stands for a measurement) and follows the device.
"""

from collections import defaultdict, deque

from core.types import SliceKind

_WINDOW = 32


class SliceEstimator:
    """Upper estimate (s) of a slice: the slowest of the last 32 of its kind and size.

    A maximum over a window, because the longest slice is what delays inference; a window, because one
    outlier must not bar that kind for ever.
    """

    def __init__(self) -> None:
        self._recent: dict[tuple[SliceKind, int], deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))

    def observe(self, kind: SliceKind, num_tokens: int, latency_s: float) -> None:
        """Take in one measured slice."""
        self._recent[kind, num_tokens.bit_length()].append(latency_s)

    def predict(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Seconds, from the nearest measured size of that kind scaled by tokens; None if the kind is unknown."""
        nearest = self._nearest(kind, num_tokens)
        if nearest is None:
            return None
        return max(self._recent[kind, nearest]) * 2.0 ** max(0, num_tokens.bit_length() - nearest)

    def relax(self, kind: SliceKind, num_tokens: int) -> None:
        """Forget the slowest measurement behind an estimate that kept a slice out: outliers must not starve it."""
        nearest = self._nearest(kind, num_tokens)
        if nearest is not None and len(self._recent[kind, nearest]) > 1:
            self._recent[kind, nearest].remove(max(self._recent[kind, nearest]))

    def _nearest(self, kind: SliceKind, num_tokens: int) -> int | None:
        """The measured power-of-two size closest to `num_tokens`; the larger one if two are as close."""
        bucket = num_tokens.bit_length()
        sizes = [size for known, size in self._recent if known is kind]
        return min(sizes, key=lambda size: (abs(size - bucket), -size)) if sizes else None
