"""The record of one run, a JSON file in `DIR/runs/`, and its curves: how good is the live version at each moment?

Tables, pictures and checks are made from these files alone.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.studies.drift.plan import DriftPlan
from core.errors import MaceError

BASE = "base"

Vector = npt.NDArray[np.float64]

_COUNTERS = {"retrain_rate", "gamma", "level", "steps", "pairs", "version"}


class DriftError(MaceError):
    """A run did not come to its end, or cannot be measured."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Look(_Record):
    """The server's counters at one moment. None: it does not tell."""

    time_s: float
    """Time since the first phase began."""
    version: str
    """Live version: `v000N` or `base`."""
    steps: int
    """Optimizer steps so far."""
    pairs: int
    """Pairs that they trained, each pass counted."""
    phase: str
    decision: str | None = None
    """The gate's last words."""
    queued_pairs: int | None = None
    retrain_rate: float | None = None
    gamma: float | None = None
    level: float | None = None
    """Drift level, 0 to 1."""


class Reply(_Record):
    """One answered chat request."""

    sent_s: float
    style: str | None
    is_right: bool


class Stream(_Record):
    """The light stream of chat requests; those of the warm-up are left out."""

    num_requests: int = 0
    errors: tuple[str, ...] = ()
    ttft_s: tuple[float, ...] = ()
    """First token minus scheduled arrival."""
    tbt_s: tuple[float, ...] = ()
    replies: tuple[Reply, ...] = ()


class Posts(_Record):
    """Outcome of the posted pairs."""

    accepted: int = 0
    errors: tuple[str, ...] = ()
    p99_s: float | None = None
    """99th percentile of the time of a `POST /v1/feedback`."""
    max_lag_s: float = 0.0
    """Largest delay between the planned and the real time of sending."""


@dataclass(frozen=True, slots=True)
class Point:
    """One row of the table."""

    policy: str
    seed: int
    time_s: float
    phase: int
    """0, 1, ..."""
    style: str
    """Preferred in this phase."""
    accuracy: float
    """Share of the held-out pairs of this style with margin > 0; a margin of exactly 0 (the base) counts one half."""
    margin: float
    """beta x (log-prob of chosen - of rejected - the same of the base), mean over the pairs."""
    clpd: float
    """Sequence-level: log-prob of chosen - of rejected (nats), mean over the pairs."""
    retrain_rate: float | None
    gamma: float | None
    level: float | None
    steps: int
    pairs: int
    version: str


class Run(_Record):
    """One policy with one seed, as it is recorded, and what follows from its scores."""

    policy: str
    seed: int
    plan: DriftPlan
    args: dict[str, Any]
    """The server's settings, as in its config file."""
    versions: dict[str, str]
    """Version by package."""
    beta: float
    looks: tuple[Look, ...] = Field(min_length=1)
    stream: Stream
    posts: Posts
    scores: dict[str, dict[str, tuple[tuple[float, float], ...]]]
    """Log-probs (nats) of chosen and rejected of each held-out pair in their fixed order, by version and style."""
    facts: dict[str, tuple[str, ...]]
    """The fact behind each held-out pair, by style; pairs of one fact are not independent."""
    adapters: tuple[dict[str, Any], ...] = ()
    """`GET /v1/adapters` at the end."""
    start_s: float
    """From the start of the server to readiness."""
    served_gap: float
    """Largest difference (nats) of a token's log-prob between the server's `<name>` and the live version's files."""

    @cached_property
    def _differences(self) -> dict[tuple[str, str], Vector]:
        """Log-prob of chosen minus that of rejected, by version and style."""
        return {
            (version, style): np.array([chosen - rejected for chosen, rejected in pairs])
            for version, by_style in self.scores.items()
            for style, pairs in by_style.items()
        }

    def margins(self, version: str, style: str) -> Vector:
        """Margin of each held-out pair."""
        return self.beta * (self._differences[version, style] - self._differences[BASE, style])

    def hits(self, version: str, style: str) -> Vector:
        """Score of each held-out pair: 1 if its margin is positive, 0.5 if it is 0, else 0."""
        margins = self.margins(version, style)
        return np.where(margins == 0, 0.5, (margins > 0).astype(float))

    @cached_property
    def points(self) -> list[Point]:
        """The row of each look at the counters, in order of time, judged by the style of its phase."""
        points = []
        for look in self.looks:
            phase = self.plan.phase_at(look.time_s)
            style = self.plan.styles[phase].value
            points.append(
                Point(
                    policy=self.policy,
                    seed=self.seed,
                    time_s=round(look.time_s, 3),
                    phase=phase,
                    style=style,
                    accuracy=float(self.hits(look.version, style).mean()),
                    margin=float(self.margins(look.version, style).mean()),
                    clpd=float(self._differences[look.version, style].mean()),
                    **look.model_dump(include=_COUNTERS),
                )
            )
        return points

    def of_phase(self, phase: int) -> list[Point]:
        """Rows of one phase."""
        return [point for point in self.points if point.phase == phase]

    def steps_before(self, phase: int) -> int:
        """Optimizer steps made before a phase began."""
        return max((point.steps for point in self.points if point.phase < phase), default=0)

    def steps_in(self, phase: int) -> int:
        """Optimizer steps made during a phase."""
        return self.of_phase(phase)[-1].steps - self.steps_before(phase)


def write_csv(runs: Iterable[Run], path: Path) -> None:
    """One row for each look at the counters."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Point)])
        writer.writeheader()
        for run in runs:
            writer.writerows(map(asdict, run.points))


def mean_accuracy(points: Sequence[Point]) -> float:
    """Mean over time; looks are evenly spaced."""
    return float(np.mean([point.accuracy for point in points]))
