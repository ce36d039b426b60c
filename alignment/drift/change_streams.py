"""Change detection on a bounded stream of rows, with `river`'s detectors, and where the change was.

The detectors of river cannot be written to JSON, so a stream keeps the rows that they have seen since they were made:
feeding those rows to new detectors gives the same detectors. Rows are bounded, because a full stream forgets its oldest
quarter and makes new detectors of the rest; they start anew after every change, too. So a stream that was stored and
restored in the middle gives the same answers as one that was not.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple

EventKind = Literal["accuracy", "margin", "loss", "prompt_length", "prompt_novelty", "window"]


class Row(NamedTuple):
    """One observation: position in the order of arrival, and up to two numbers."""

    seq: int
    first: float
    second: float


Detector = Callable[[float], bool]
"""Takes one value; True if the mean has changed."""


def adwin(delta: float) -> Detector:
    """ADWIN (Bifet and Gavalda, 2007) on values in 0..1, for changes up or down, asked after every value.

    river asks after every 32nd by default, which with few pairs costs up to 31 pairs of delay.
    """
    from river.drift import ADWIN

    return _watch(ADWIN(delta=delta, clock=1))


def error_rise(confidence: float) -> Detector:
    """HDDM_A (Frías-Blanco et al., 2015) on errors, 0 or 1: finds a point since which their mean is above that before.

    It looks for a rise of a share only, and finds a sudden one in a third of the pairs that ADWIN needs.
    """
    from river.drift.binary import HDDMA

    return _watch(HDDMA(drift_confidence=confidence))


def _watch(test: Any) -> Detector:
    def update(value: float) -> bool:
        test.update(value)
        return bool(test.drift_detected)

    return update


class LossRise:
    """Page-Hinkley (1954) on a loss, with a slack that follows the losses seen so far.

    A walk whose steps X - slack satisfy E[exp(r (X - slack))] = 1 exceeds the threshold h about every exp(r h) steps
    (Wald's identity). So r = ln(steps between false alarms) / h and the slack is ln E[exp(r X)] / r, with means over
    the losses so far. A fixed slack misses changes of a steady loss or reports a noisy one all the time
    (docs/measurements/drift_detection.md).
    """

    _LOG_RUN_LENGTH = 12.0
    """exp(12) = 160,000 losses between two false alarms, if losses go on as before."""
    _MAX_LOSS = 1.5
    """Larger losses count as this one (nats): no single pair raises an alarm, and rare ones are learned soon."""
    _MIN_SLACK = 0.02
    _MIN_PAIRS = 20
    _MAX_RATE = 100.0

    def __init__(self, threshold: float) -> None:
        from river.drift import PageHinkley

        self._test = PageHinkley(min_instances=self._MIN_PAIRS, threshold=threshold, mode="up")
        self._rate = min(self._LOG_RUN_LENGTH / threshold, self._MAX_RATE)
        self._num_seen = 1
        self._total = self._MAX_LOSS
        self._total_exp = math.exp(self._rate * self._MAX_LOSS)
        """Begins with one largest loss, because rare ones have not been seen yet."""

    def __call__(self, value: float) -> bool:
        """Take one loss in nats; True if the mean has risen."""
        value = min(max(value, -self._MAX_LOSS), self._MAX_LOSS)
        slack = math.log(self._total_exp / self._num_seen) / self._rate - self._total / self._num_seen
        self._test.delta = max(self._MIN_SLACK, slack)
        self._test.update(value)
        self._num_seen += 1
        self._total += value
        self._total_exp += math.exp(self._rate * value)
        return bool(self._test.drift_detected)


@dataclass(frozen=True, slots=True)
class Channel:
    """One quantity of a stream's rows, watched by one detector."""

    kind: EventKind
    method: str
    """Name of the detector, for people."""
    detector: Callable[[], Detector]
    watched: Callable[[Row], float]
    """The value that the detector is given."""
    reported: Callable[[Row], float]
    """The same quantity in the unit that people read."""
    alarming: Literal["fall", "rise", "both"]
    """Direction of a change that is reported; a change the other way only starts the stream anew."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change in the alarming direction."""

    channel: Channel
    before: float
    after: float
    num_rows: int
    """Rows since the change."""
    last_seq_before: int
    """Sequence number of the last row before the change."""

    @property
    def detail(self) -> str:
        """The change in words, for people."""
        quantity = self.channel.kind.replace("_", " ")
        return (
            f"{self.channel.method}: mean {quantity} {self.before:.2f} -> {self.after:.2f} "
            f"over the newest {self.num_rows} pairs"
        )


class ChangeStream:
    """Keeps at most `capacity` rows since the last change, and a detector for each channel."""

    def __init__(self, channels: Sequence[Channel], capacity: int, rows: Iterable[Row] = ()) -> None:
        """With `rows` of another stream, of the same channels and capacity, go on where that stream was."""
        self._channels = channels
        self._capacity = capacity
        self.rows: list[Row] = []
        self._detectors: list[Detector] = []
        for row in rows:
            self.update(row)

    def update(self, row: Row) -> list[Change]:
        """Take one row; returns the changes that it brought to light."""
        if not self._detectors:  # not in the constructor: importing river takes seconds
            self._detectors = [channel.detector() for channel in self._channels]
        self.rows.append(row)
        fired = self._feed(row)
        if fired is None and len(self.rows) < self._capacity:
            return []
        changes = []
        if fired is None:
            fired = self._restart(self.rows[self._capacity // 4 :])
        while fired is not None:
            channel, num_seen = fired
            start = change_point([channel.watched(row) for row in self.rows[:num_seen]])
            changes.append(self._describe(channel, start))
            fired = self._restart(self.rows[start:])
        return [change for change in changes if _is_alarming(change)]

    def _feed(self, row: Row) -> tuple[Channel, int] | None:
        fired = [detect(c.watched(row)) for c, detect in zip(self._channels, self._detectors, strict=True)]
        return (self._channels[fired.index(True)], len(self.rows)) if any(fired) else None

    def _restart(self, rows: list[Row]) -> tuple[Channel, int] | None:
        """New detectors on these rows; returns the channel of the first detection, and at which row, if any."""
        self.rows = rows
        self._detectors = [channel.detector() for channel in self._channels]
        for num_seen, row in enumerate(rows, 1):
            fired = self._feed(row)
            if fired is not None:
                return fired[0], num_seen
        return None

    def _describe(self, channel: Channel, start: int) -> Change:
        before, after = (fmean(map(channel.reported, rows)) for rows in (self.rows[:start], self.rows[start:]))
        return Change(channel, before, after, len(self.rows) - start, self.rows[start - 1].seq)


def change_point(values: Sequence[float]) -> int:
    """Index of the first value after the change: the split of two or more values that leaves the least squared error.

    ADWIN's own cut is no estimate of it: it drops its oldest bucket, and at detection often keeps hundreds of old rows.
    """
    import numpy as np

    data = np.asarray(values, dtype=float)
    num_before = np.arange(1, len(data))
    total = np.cumsum(data)
    mean_before = total[:-1] / num_before
    mean_after = (total[-1] - total[:-1]) / (len(data) - num_before)
    gain = num_before * (len(data) - num_before) * (mean_after - mean_before) ** 2
    return int(np.argmax(gain)) + 1


def _is_alarming(change: Change) -> bool:
    direction = change.channel.alarming
    return direction == "both" or (change.after < change.before) == (direction == "fall")
