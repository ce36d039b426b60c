"""Whose the joules are: idling, serving or training.

Between two readings of the sensors the device was busy `F` seconds with forward passes and `S` with slices. A period
with neither is idle; the mean power of all idle ones is `P`. The joules `E` and the seconds `T` of any other period
are shared by `F : S`, and what idling would have taken is taken off:

    serving_j  = Σ F / (F + S) · (E - P·T)
    training_j = Σ S / (F + S) · (E - P·T)

Serving over the tokens that were generated, in thousands, and training over the pairs that went through an optimizer
step are the two numbers of a report. Scoring and gate evaluations are slices too, so a pair's joules hold its share
of them.
"""

from dataclasses import dataclass
from typing import Any

from profiler.energy import EnergyMeter

_MIN_IDLE_S = 5.0
"""Fewer idle seconds than this do not say what idling takes."""


@dataclass(slots=True)
class _Share:
    joules: float = 0.0
    seconds: float = 0.0

    def add(self, joules: float, seconds: float) -> None:
        self.joules += joules
        self.seconds += seconds


class EnergyAccount:
    """Adds up periods; see the module docstring."""

    def __init__(self) -> None:
        self._idle, self._serving, self._training = _Share(), _Share(), _Share()

    def add(self, seconds: float, joules: float, forward_s: float, slices_s: float) -> None:
        """Take in a period: its length, what the sensors counted, and how long forward passes and slices ran in it."""
        busy_s = forward_s + slices_s
        if busy_s <= 0:
            self._idle.add(joules, seconds)
            return
        part = forward_s / busy_s
        self._serving.add(part * joules, part * seconds)
        self._training.add((1 - part) * joules, (1 - part) * seconds)

    @property
    def idle_w(self) -> float | None:
        """Mean power of idle periods; None until there were enough of them."""
        return self._idle.joules / self._idle.seconds if self._idle.seconds >= _MIN_IDLE_S else None

    def to_wire(self, meter: EnergyMeter, num_tokens: float, num_pairs: float) -> dict[str, Any]:
        """Joules per 1,000 tokens and per pair; None where there are none yet, or nothing is measured (`reason`)."""
        idle_w = self.idle_w
        reason = meter.reason
        if reason is None and idle_w is None:
            reason = f"what idling takes is known after {_MIN_IDLE_S:g} s without work"

        def per(share: _Share, count: float) -> float | None:
            over_idle_j = None if idle_w is None else max(0.0, share.joules - idle_w * share.seconds)
            return None if over_idle_j is None or reason is not None or not count else over_idle_j / count

        return {
            "sensors": meter.sensors,
            "reason": reason,
            "idle_w": None if meter.reason else idle_w,
            "joules_per_1000_tokens": per(self._serving, num_tokens / 1000),
            "joules_per_pair": per(self._training, num_pairs),
        }
