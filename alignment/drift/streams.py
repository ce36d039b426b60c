"""Streams of scores (all pairs, each user, each tag), and the changes for the worse in them.

What goes into drift detection is a `ScoredPair`; what comes out of it is a `DriftEvent`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

from alignment.drift.change_streams import (
    Change,
    ChangeStream,
    Channel,
    EventKind,
    LossRise,
    Row,
    adwin,
    error_rise,
)

GLOBAL = "global"
_GLOBAL_ROWS = 1024
_STREAM_ROWS = 256
"""Rows kept for each user and tag. With half as many, a change that takes 200 pairs is missed one time in three."""
_SHOWN_ROWS = 32
_MAX_TAGS = 8
"""Tags of one pair that are watched, the first by name."""
_MAX_NAME = 256
MAX_STREAMS = 200
"""Users and tags watched at a time, besides the global stream; the least recent are dropped first."""
MAX_SCORE = 1e6
"""Losses and margins (nats) beyond this are absurd: they say something about the adapter, not about preferences."""
TRUSTED_WEIGHT = 0.5
"""Pairs of smaller weight are seen on their user's stream only, so that one hostile user raises no alarm for all."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Sensitivity of the detectors. Behind the defaults stands docs/measurements/drift_detection.md."""

    adwin_delta: float = 0.002
    """Chance that ADWIN reports a change in a stream that has none."""
    hddm_confidence: float = 0.001
    """Chance that HDDM_A takes wrong pairs that come as before for more of them; it finds sudden changes first."""
    page_hinkley_threshold: float = 5.0
    """Page-Hinkley reports a rise of the loss once its cumulated excess is above this (nats)."""


SENSITIVITY = Sensitivity()


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
    """Trust in the pair, in 0..1 (clients may ask for more)."""
    at: float
    """Unix seconds."""

    @property
    def trusted(self) -> bool:
        """True if the pair speaks for more than its own user."""
        return self.weight >= TRUSTED_WEIGHT


@dataclass(frozen=True, slots=True)
class DriftEvent:
    """A change, as it is stored and shown."""

    at: float
    """Unix seconds."""
    stream: str
    """`global`, `prompts`, `user:<id>` or `tag:<key>=<value>`."""
    kind: EventKind
    value: float
    """Mean of the watched quantity after the change."""
    detail: str
    """The change in words, with the value before."""


@dataclass(slots=True)
class _Stream:
    changes: ChangeStream
    num_pairs: int = 0
    last_event: dict[str, Any] | None = None


class ScoreStreams:
    """The global stream and at most `MAX_STREAMS` others, the least recently updated dropped first."""

    def __init__(self, sensitivity: Sensitivity | None = None) -> None:
        self._channels = channels(sensitivity or SENSITIVITY)
        self._streams = {GLOBAL: self._new(GLOBAL)}
        """The global stream first, then the least recently updated first."""

    def update(self, pair: ScoredPair) -> list[tuple[str, Change]]:
        """Take the score of a new pair; returns the changes that it brought to light, each after its stream's name.

        A pair that is not trusted is seen on its user's stream only.
        """
        row = Row(pair.seq, _rounded(pair.loss), _rounded(pair.margin))
        found = []
        for name in ((GLOBAL,) if pair.trusted else ()) + stream_names(pair):
            stream = self._streams.get(name) or self._new(name)
            if name != GLOBAL:
                self._streams.pop(name, None)
                self._streams[name] = stream
                self._drop_oldest()
            stream.num_pairs += 1
            found += [(name, change) for change in stream.changes.update(row)]
        return found

    def note_event(self, event: DriftEvent) -> None:
        """Remember the newest event of a stream, for people."""
        stream = self._streams.get(event.stream)
        if stream is not None:
            stream.last_event = asdict(event)

    def to_wire(self) -> dict[str, Any]:
        """Each stream's pairs so far, accuracy and mean margin over its newest pairs, and last event."""
        first, *others = self._streams.items()
        return {name: _show(stream) for name, stream in (first, *reversed(others))}

    def to_state(self) -> list[dict[str, Any]]:
        """All streams as JSON, the global one first, then the least recently updated first."""
        return [
            {
                "name": name,
                "num_pairs": stream.num_pairs,
                "last_event": stream.last_event,
                "rows": [list(column) for column in zip(*stream.changes.rows, strict=True)],
            }
            for name, stream in self._streams.items()
        ]

    @classmethod
    def from_state(cls, state: Iterable[Mapping[str, Any]]) -> "ScoreStreams":
        """Inverse of `to_state`."""
        streams = cls()
        for entry in state:
            rows = [Row(int(seq), float(a), float(b)) for seq, a, b in zip(*entry["rows"], strict=True)]
            stream = streams._new(entry["name"], rows)
            stream.num_pairs, stream.last_event = int(entry["num_pairs"]), entry["last_event"]
            streams._streams[entry["name"]] = stream
        streams._drop_oldest()
        return streams

    def _new(self, name: str, rows: Iterable[Row] = ()) -> _Stream:
        return _Stream(ChangeStream(self._channels, _GLOBAL_ROWS if name == GLOBAL else _STREAM_ROWS, rows))

    def _drop_oldest(self) -> None:
        while len(self._streams) > MAX_STREAMS + 1:
            del self._streams[next(name for name in self._streams if name != GLOBAL)]


def stream_names(pair: ScoredPair) -> tuple[str, ...]:
    """The user's stream, and those of the tags unless the pair is not trusted."""
    users = [f"user:{pair.user}"] if pair.user else []
    tags = [f"tag:{key}={pair.tags[key]}" for key in sorted(pair.tags)[:_MAX_TAGS]] if pair.trusted else []
    return tuple(name[:_MAX_NAME] for name in users + tags)


def channels(sensitivity: Sensitivity) -> tuple[Channel, ...]:
    """The quantities of a stream of scores that are watched.

    A margin is watched as the probability sigmoid(margin) that the model of Bradley and Terry gives the choice.
    """
    hddm, any_change = partial(error_rise, sensitivity.hddm_confidence), partial(adwin, sensitivity.adwin_delta)
    page_hinkley = partial(LossRise, sensitivity.page_hinkley_threshold)
    return (
        Channel("accuracy", "HDDM_A", hddm, _error, _accuracy, "fall"),
        Channel("accuracy", "ADWIN", any_change, _accuracy, _accuracy, "fall"),
        Channel("margin", "ADWIN", any_change, _probability, _margin, "fall"),
        Channel("loss", "Page-Hinkley", page_hinkley, _loss, _loss, "rise"),
    )


def is_score(loss: float, margin: float) -> bool:
    """True if both are finite and of a size that a preference can have."""
    return math.isfinite(loss) and math.isfinite(margin) and abs(loss) < MAX_SCORE and abs(margin) < MAX_SCORE


def _loss(row: Row) -> float:
    return row.first


def _margin(row: Row) -> float:
    return row.second


def _accuracy(row: Row) -> float:
    return float(row.second > 0)


def _error(row: Row) -> float:
    return 1.0 - _accuracy(row)


def _probability(row: Row) -> float:
    return 0.5 * (1.0 + math.tanh(row.second / 2))


def _rounded(value: float) -> float:
    """Four digits after the point, but never a sign lost: half as long in JSON, and the same to any detector."""
    rounded = round(value, 4)
    return math.copysign(1e-4, value) if rounded == 0 and value != 0 else rounded


def _show(stream: _Stream) -> dict[str, Any]:
    rows = stream.changes.rows[-_SHOWN_ROWS:]
    shown = {"accuracy": _accuracy, "mean_margin": _margin, "mean_loss": _loss}
    means = {name: fmean(map(quantity, rows)) if rows else None for name, quantity in shown.items()}
    return {"num_pairs": stream.num_pairs, **means, "last_event": stream.last_event}
