"""What goes into drift detection (a scored pair), and what comes out of it (an event)."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

EventKind = Literal["accuracy", "margin", "loss", "prompt_length", "prompt_novelty", "window"]

MAX_SCORE = 1e6
"""Losses and margins (nats) beyond this are absurd: they say something about the adapter, not about preferences."""
TRUSTED_WEIGHT = 0.5
"""Pairs of smaller weight are seen on their user's stream only, so that one hostile user raises no alarm for all."""


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """A new pair as the live adapter sees it before any training on it ("test, then train")."""

    pair_id: str
    seq: int
    """Position of the pair in the order of arrival."""
    loss: float
    """DPO loss in nats; ln 2 = 0.693 if the adapter has no preference."""
    margin: float
    """Implicit reward margin: beta times (CLPD of the live adapter minus CLPD of the reference)."""
    prompt: str
    user: str | None
    tags: Mapping[str, str]
    weight: float
    """How far the pair is trusted, in 0..1 (clients may ask for more)."""
    at: float
    """Unix seconds."""

    @property
    def trusted(self) -> bool:
        """Does the pair speak for more than its own user?"""
        return is_trusted(self.weight)


@dataclass(frozen=True, slots=True)
class DriftEvent:
    """Something changed, and what."""

    at: float
    """Unix seconds."""
    stream: str
    """`global`, `prompts`, `user:<id>` or `tag:<key>=<value>`."""
    kind: EventKind
    value: float
    """Mean of the watched quantity after the change."""
    detail: str
    """In words, with the value before."""

    def to_wire(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def is_score(loss: float, margin: float) -> bool:
    """Are both finite and of a size that a preference can have?"""
    return math.isfinite(loss) and math.isfinite(margin) and abs(loss) < MAX_SCORE and abs(margin) < MAX_SCORE


def is_trusted(weight: float) -> bool:
    """Does a pair of this weight speak for more than its own user? A weight that is no number does not."""
    return weight >= TRUSTED_WEIGHT
