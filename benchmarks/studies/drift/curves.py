"""From a run's record to its curves: what was live at each moment, and how good that is for the style of the moment."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.studies.drift.record import BASE, Look, RunRecord

Vector = npt.NDArray[np.float64]

CSV_NAME = "drift.csv"


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


class Run:
    """A record with its scores worked out."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.policy = record.policy
        self.seed = record.seed
        self.plan = record.plan
        self._differences = {
            (version, style): np.array([chosen - rejected for chosen, rejected in pairs])
            for version, by_style in record.scores.items()
            for style, pairs in by_style.items()
        }

    def margins(self, version: str, style: str) -> Vector:
        """Of each held-out pair."""
        return self.record.beta * (self._differences[version, style] - self._differences[BASE, style])

    def hits(self, version: str, style: str) -> Vector:
        """Of each held-out pair: 1 if its margin is positive, 0.5 if it is 0, else 0."""
        margins = self.margins(version, style)
        return np.where(margins == 0, 0.5, (margins > 0).astype(float))

    def point(self, look: Look, phase: int) -> Point:
        """The row of one look at the counters, judged by the style of a phase."""
        style = self.plan.styles[phase].value
        return Point(
            policy=self.policy,
            seed=self.seed,
            time_s=round(look.time_s, 3),
            phase=phase,
            style=style,
            accuracy=float(self.hits(look.version, style).mean()),
            margin=float(self.margins(look.version, style).mean()),
            clpd=float(self._differences[look.version, style].mean()),
            retrain_rate=look.retrain_rate,
            gamma=look.gamma,
            level=look.level,
            steps=look.steps,
            pairs=look.pairs,
            version=look.version,
        )

    @cached_property
    def points(self) -> list[Point]:
        """All rows, in order of time."""
        return [self.point(look, self.plan.phase_at(look.time_s)) for look in self.record.looks]

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
    """Over time; looks are evenly spaced."""
    return float(np.mean([point.accuracy for point in points]))
