"""Streams of scores (all pairs, each user, each tag), and the changes for the worse in them."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from alignment.drift.change_streams import Adwin, Change, ChangeStream, Channel, ErrorRise, LossRise, Row
from alignment.drift.events import DriftEvent, ScoredPair
from core.alignment_config import DriftConfig

GLOBAL = "global"
_GLOBAL_ROWS = 1024
_STREAM_ROWS = 256
"""Rows kept for each user and tag. With half as many, a change that takes 200 pairs is missed one time in three."""
_SHOWN_ROWS = 32
_MAX_TAGS = 8
"""Tags of one pair that are watched, the first by name."""
_MAX_NAME = 256


class StreamChange(NamedTuple):
    """A change, and the stream it was found in."""

    stream: str
    change: Change


@dataclass(slots=True)
class _Stream:
    changes: ChangeStream
    num_pairs: int = 0
    last_event: dict[str, Any] | None = field(default=None)


class ScoreStreams:
    """The global stream and at most `config.max_streams` others, the least recently updated dropped first."""

    def __init__(self, config: DriftConfig) -> None:
        self._config = config
        self._channels = _channels(config)
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        self._global = self._new(GLOBAL)

    def update(self, pair: ScoredPair) -> list[StreamChange]:
        """Take the score of a new pair. One that is not trusted is seen on its user's stream only."""
        row = Row(pair.seq, _rounded(pair.loss), _rounded(pair.margin))
        found = []
        if pair.trusted:
            found += self._feed(GLOBAL, self._global, row)
        for name in stream_names(pair):
            found += self._feed(name, self._stream(name), row)
        return found

    def note_event(self, event: DriftEvent) -> None:
        """Remember the newest event of a stream, for people."""
        stream = self._global if event.stream == GLOBAL else self._streams.get(event.stream)
        if stream is not None:
            stream.last_event = event.to_wire()

    def to_wire(self) -> dict[str, Any]:
        """Each stream's pairs so far, accuracy and mean margin over its newest pairs, and last event."""
        rows = [(GLOBAL, self._global), *reversed(self._streams.items())]
        return {name: _show(stream) for name, stream in rows}

    def to_state(self) -> list[dict[str, Any]]:
        """As JSON, the global stream first, then the least recently updated first."""
        return [
            {
                "name": name,
                "num_pairs": stream.num_pairs,
                "last_event": stream.last_event,
                "rows": [list(column) for column in zip(*stream.changes.rows, strict=True)],
            }
            for name, stream in [(GLOBAL, self._global), *self._streams.items()]
        ]

    @classmethod
    def from_state(cls, state: Iterable[Mapping[str, Any]], config: DriftConfig) -> "ScoreStreams":
        """Inverse of `to_state`."""
        streams = cls(config)
        for entry in state:
            rows = [Row(int(seq), float(a), float(b)) for seq, a, b in zip(*entry["rows"], strict=True)]
            stream = streams._new(entry["name"], rows)
            stream.num_pairs, stream.last_event = int(entry["num_pairs"]), entry["last_event"]
            if entry["name"] == GLOBAL:
                streams._global = stream
            else:
                streams._streams[entry["name"]] = stream
        streams._drop_oldest()
        return streams

    def _stream(self, name: str) -> _Stream:
        if name not in self._streams:
            self._streams[name] = self._new(name)
            self._drop_oldest()
        self._streams.move_to_end(name)
        return self._streams[name]

    def _new(self, name: str, rows: Iterable[Row] = ()) -> _Stream:
        return _Stream(ChangeStream(self._channels, _GLOBAL_ROWS if name == GLOBAL else _STREAM_ROWS, rows))

    def _drop_oldest(self) -> None:
        while len(self._streams) > self._config.max_streams:
            self._streams.popitem(last=False)

    @staticmethod
    def _feed(name: str, stream: _Stream, row: Row) -> list[StreamChange]:
        stream.num_pairs += 1
        return [StreamChange(name, change) for change in stream.changes.update(row)]


def stream_names(pair: ScoredPair) -> tuple[str, ...]:
    """The user's stream, and those of the tags unless the pair is not trusted."""
    users = [f"user:{pair.user}"] if pair.user else []
    tags = [f"tag:{key}={pair.tags[key]}" for key in sorted(pair.tags)[:_MAX_TAGS]] if pair.trusted else []
    return tuple(name[:_MAX_NAME] for name in users + tags)


def _channels(config: DriftConfig) -> tuple[Channel, ...]:
    """A margin is watched as the probability sigmoid(margin) that the model of Bradley and Terry gives the choice."""
    return (
        Channel("accuracy", "HDDM_A", lambda: ErrorRise(config.hddm_confidence), _error, _accuracy, "fall"),
        Channel("accuracy", "ADWIN", lambda: Adwin(config.adwin_delta), _accuracy, _accuracy, "fall"),
        Channel("margin", "ADWIN", lambda: Adwin(config.adwin_delta), _probability, _margin, "fall"),
        Channel("loss", "Page-Hinkley", lambda: LossRise(config.page_hinkley_threshold), _loss, _loss, "rise"),
    )


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
    count = len(rows)
    return {
        "num_pairs": stream.num_pairs,
        "accuracy": sum(map(_accuracy, rows)) / count if rows else None,
        "mean_margin": sum(map(_margin, rows)) / count if rows else None,
        "mean_loss": sum(map(_loss, rows)) / count if rows else None,
        "last_event": stream.last_event,
    }
