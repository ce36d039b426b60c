"""How much to train: the drift level sets a rate, new pairs earn training slots at that rate, batches spend them."""

import math
from collections.abc import Mapping
from typing import Any

from core.alignment_config import DriftConfig


def interpolate(quiet: float, alarm: float, level: float) -> float:
    """Between `quiet` (level 0) and `alarm` (level 1): geometrically, so that each bit of level multiplies.

    A quiet value of 0 has no geometric mean with anything; there it is linear.
    """
    level = min(max(level, 0.0), 1.0) if math.isfinite(level) else 1.0
    if level in (0.0, 1.0):
        return alarm if level else quiet
    if quiet <= 0 or alarm <= 0:
        return quiet + (alarm - quiet) * level
    return math.exp(math.log(quiet) + (math.log(alarm) - math.log(quiet)) * level)


def retrain_rate(config: DriftConfig, level: float) -> float:
    """Training slots that each new pair earns."""
    return interpolate(config.quiet_rate, config.alarm_rate, level)


def gamma_factor(config: DriftConfig, level: float) -> float:
    """Factor of `scheduler.gamma`, the weight of the loss in the priority of fine-tune tasks."""
    return interpolate(config.quiet_gamma, config.alarm_gamma, level)


class TrainingCredit:
    """A token bucket of training slots; one slot trains one pair once. Never above its bound, never below 0."""

    def __init__(self, max_slots: float = 256.0) -> None:
        self._max_slots = max_slots
        self._balance = 0.0

    @property
    def balance(self) -> float:
        """Slots left, with their fraction."""
        return self._balance

    def earn(self, num_new_pairs: int, rate: float) -> None:
        """New scored training pairs came in, each worth `rate` slots."""
        earned = num_new_pairs * rate
        if math.isfinite(earned) and earned > 0:
            self._balance = min(self._max_slots, self._balance + earned)

    def top_up(self, num_slots: int) -> None:
        """Grant slots for another pass: up to `num_slots` in all, so that asking again adds nothing."""
        self._balance = max(self._balance, min(self._max_slots, float(num_slots)))

    def spend(self, num_slots: int) -> int:
        """Take up to `num_slots` whole slots; returns how many were there."""
        granted = max(0, min(num_slots, int(self._balance + _ROUNDING)))
        self._balance = max(0.0, self._balance - granted)
        return granted

    def refund(self, num_slots: int) -> None:
        """Give back slots that found no pair."""
        self._balance = min(self._max_slots, self._balance + max(0, num_slots))

    def to_state(self) -> dict[str, Any]:
        """As JSON."""
        return {"balance": self._balance}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], max_slots: float = 256.0) -> "TrainingCredit":
        """Inverse of `to_state`; a smaller bound than before cuts the balance."""
        credit = cls(max_slots)
        credit.earn(1, float(state["balance"]))
        return credit


_ROUNDING = 1e-9
"""Ten times 0.1 is one slot."""
