"""Drift of preferences: has something changed, how alarming is it, and how much training does it call for?

Every new pair is scored by the live adapter before anything is trained on it ("test, then train"). Three signals:

1. the level window (`alignment.drift.window`): does the live adapter agree with the newest pairs? Fixed bounds.
2. change detection on streams of scores, of all pairs, each user and each tag (`alignment.drift.streams`).
3. change detection on the prompts (`alignment.drift.input_drift`).

They raise one level in 0..1, which halves with every `half_life_pairs` scores without a complaint. The level sets the
retrain rate and the weight of the loss in the priority (`alignment.drift.retrain_rate`).
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from alignment.drift.events import DriftEvent, ScoredPair, is_score, is_trusted
from alignment.drift.input_drift import PROMPTS, InputDrift
from alignment.drift.retrain_rate import gamma_factor, retrain_rate
from alignment.drift.streams import GLOBAL, ScoreStreams, StreamChange, stream_names
from alignment.drift.window import LevelWindow, Score
from core.alignment_config import DriftConfig

__all__ = ["DriftEvent", "DriftTracker", "ScoredPair"]

_INPUT_LEVEL = 0.5
"""New prompts call for a closer look, not for an alarm."""
_ANSWERED_LEVEL = 0.5
"""An alarm is over: the level sank to this, or the newest version agrees with its users."""
_MUTED_WINDOWS = 4
"""Distrusted pairs that are remembered, in windows, so that scoring them again does not let them in."""


class DriftTracker:
    """See the module docstring. Deterministic, not thread-safe; the first pair imports river (3 s, 190 MB)."""

    def __init__(self, config: DriftConfig) -> None:
        self._config = config
        self._window = LevelWindow(config)
        self._streams = ScoreStreams(config)
        self._prompts = InputDrift(config)
        self._members: deque[tuple[str, ...]] = deque(maxlen=config.window)
        """Streams of the newest trusted pairs: how much of the traffic a user or tag is."""
        self._muted: deque[str] = deque(maxlen=_MUTED_WINDOWS * config.window)
        self._level = 1.0
        """Nothing is known yet: the first pairs of all count as an alarm."""
        self._alarm: str | None = None
        """The last change in the global stream, until it is answered."""
        self._answered = False
        """Has another version gone live since `_alarm`?"""
        self._complained = False
        """Has the present complaint been reported? Until the level is low again: one that wavers is one event."""
        self._version: str | None = None
        self._version_since_seq = 0
        self._last_seq = 0
        self._last_change_seq = 0
        self._last_change: dict[str, Any] | None = None
        self.num_ignored = 0
        """Scores that were not finite, or absurd."""

    def observe(self, pair: ScoredPair) -> list[DriftEvent]:
        """Take a new pair, in order of arrival. A pair that is known only has its score replaced."""
        if not is_score(pair.loss, pair.margin):
            self.num_ignored += 1
            return []
        if pair.pair_id in self._window or pair.pair_id in self._muted:
            self._rescore(pair.pair_id, Score(pair.loss, pair.margin))
            return []
        self._last_seq = max(self._last_seq, pair.seq)
        found = self._streams.update(pair)
        if pair.trusted:
            self._window.add(pair.pair_id, Score(pair.loss, pair.margin))
            self._members.append(stream_names(pair))
            self._settle()
            found += self._prompts.update(pair.seq, pair.prompt)
        else:
            self._muted.append(pair.pair_id)
        return self._complaint_event(pair.at) + [self._raise_alarm(change, pair.at) for change in found]

    def rescore(self, pair_id: str, loss: float, margin: float, version: str) -> None:
        """A known pair was scored by `version`; scores of a version that is not live (any more) say nothing."""
        if version != self._version:
            return
        if is_score(loss, margin):
            self._rescore(pair_id, Score(loss, margin))
        else:
            self.num_ignored += 1

    def reweigh(self, pair_id: str, weight: float) -> None:
        """A known pair turned out to be less trustworthy: it leaves the window. What it did to streams is done."""
        if not is_trusted(weight) and self._window.discard(pair_id):
            self._muted.append(pair_id)

    def forget(self, pair_id: str) -> None:
        """A pair was deleted or parked: it leaves the window."""
        self._window.discard(pair_id)

    def note_live(self, version: str) -> None:
        """Another adapter is live: the window is void until its pairs (`unscored_ids`) are scored again.

        The change detectors keep their streams: a better adapter is a change for the better, which is no alarm.
        """
        if version != self._version:
            self._version = version
            self._version_since_seq = self._last_seq
            self._answered = True
            self._window.clear_scores()

    @property
    def unscored_ids(self) -> list[str]:
        """Pairs of the window that the live version has not scored, newest first: what `rescore` waits for."""
        return self._window.unscored_ids

    @property
    def complains(self) -> bool:
        """Does the live adapter, as of now, get too many of the newest pairs wrong?"""
        return self._window.complaint() is not None

    @property
    def level(self) -> float:
        """Of alarm, in 0..1."""
        return self._level

    @property
    def drifted(self) -> bool:
        """Does the window complain, or is a change in all pairs together not yet answered?"""
        return self.complains or self._alarm is not None

    @property
    def reason(self) -> str:
        """Why `drifted` is what it is, in words."""
        if self._alarm is not None and not self.complains:
            return self._alarm
        return self._window.verdict()

    @property
    def last_change_seq(self) -> int:
        """Pairs after this sequence number belong to the present preferences; 0 if they never changed."""
        return self._last_change_seq

    @property
    def last_seq(self) -> int:
        """Newest pair observed: after a restart, later ones in the store have to be observed again."""
        return self._last_seq

    @property
    def retrain_rate(self) -> float:
        """Training slots that each new pair earns now."""
        return retrain_rate(self._config, self._level)

    @property
    def gamma_factor(self) -> float:
        """Factor of `scheduler.gamma` now."""
        return gamma_factor(self._config, self._level)

    def to_wire(self) -> dict[str, Any]:
        """State for people, as `GET /v1/drift` shows it."""
        return {
            "drifted": self.drifted,
            "reason": self.reason,
            "level": self._level,
            "retrain_rate": self.retrain_rate,
            "gamma_factor": self.gamma_factor,
            "live_version": self._version,
            "num_pairs": self._window.num_pairs,
            "accuracy": self._window.accuracy,
            "mean_loss": self._window.mean_loss,
            "mean_margin": self._window.mean_margin,
            "last_change_seq": self._last_change_seq,
            "last_change": self._last_change,
            "num_ignored": self.num_ignored,
            "streams": self._streams.to_wire(),
            "prompts": self._prompts.to_wire(),
        }

    def to_state(self) -> dict[str, Any]:
        """As JSON, for a restart; at most about 0.7 MB (200 streams of 128 scores, 1,024 global ones)."""
        return {
            "window": self._window.to_state(),
            "streams": self._streams.to_state(),
            "prompts": self._prompts.to_state(),
            "members": [list(names) for names in self._members],
            "muted": list(self._muted),
            "level": self._level,
            "alarm": self._alarm,
            "answered": self._answered,
            "complained": self._complained,
            "version": self._version,
            "version_since_seq": self._version_since_seq,
            "last_seq": self._last_seq,
            "last_change_seq": self._last_change_seq,
            "last_change": self._last_change,
            "num_ignored": self.num_ignored,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], config: DriftConfig) -> "DriftTracker":
        """Inverse of `to_state`: goes on as if there had been no restart.

        Raises:
            KeyError, TypeError, ValueError: the state is not one of `to_state`.
        """
        tracker = cls(config)
        tracker._window = LevelWindow.from_state(state["window"], config)
        tracker._streams = ScoreStreams.from_state(state["streams"], config)
        tracker._prompts = InputDrift.from_state(state["prompts"], config)
        tracker._members.extend(tuple(names) for names in state["members"])
        tracker._muted.extend(state["muted"])
        tracker._level, tracker._alarm = float(state["level"]), state["alarm"]
        tracker._answered, tracker._complained = bool(state["answered"]), bool(state["complained"])
        tracker._version = state["version"]
        tracker._version_since_seq, tracker._last_seq = int(state["version_since_seq"]), int(state["last_seq"])
        tracker._last_change_seq, tracker._last_change = int(state["last_change_seq"]), state["last_change"]
        tracker.num_ignored = int(state["num_ignored"])
        return tracker

    def _rescore(self, pair_id: str, score: Score) -> None:
        if pair_id not in self._muted and self._window.rescore(pair_id, score):
            self._settle()

    def _settle(self) -> None:
        """After one trusted score: a complaint keeps the level up, else it decays."""
        if self.complains:
            self._level = 1.0
            return
        self._level *= 0.5 ** (1.0 / self._config.half_life_pairs)
        if self._answered and self._window.full_enough:
            self._level = min(self._level, _ANSWERED_LEVEL)
        if self._level <= _ANSWERED_LEVEL:
            self._complained, self._alarm = False, None

    def _complaint_event(self, at: float) -> list[DriftEvent]:
        complaint = self._window.complaint()
        if complaint is None or self._complained:
            return []
        self._complained = True
        event = DriftEvent(at, GLOBAL, "window", self._window.accuracy or 0.0, complaint)
        self._streams.note_event(event)
        return [event]

    def _raise_alarm(self, found: StreamChange, at: float) -> DriftEvent:
        """A change in all pairs is a full alarm; in one user's or tag's, in proportion to its share of the pairs."""
        stream, change = found
        detail = change.detail
        if stream == GLOBAL:
            level = 1.0
            self._last_change_seq = change.last_seq_before
            self._window.keep_newest(change.num_rows)
        elif stream == PROMPTS:
            level = _INPUT_LEVEL
            detail += f" (input only: raises the level to {_INPUT_LEVEL} at most)"
        else:
            level = sum(stream in names for names in self._members) / max(1, len(self._members))
            detail += f" ({level:.0%} of the newest pairs)"
        if stream != PROMPTS and change.last_seq_before <= self._version_since_seq < self._last_seq:
            detail += f"; {self._version} went live meanwhile"
        event = DriftEvent(at, stream, change.channel.kind, change.after, detail)
        if stream == GLOBAL:
            self._alarm, self._answered, self._last_change = detail, False, event.to_wire()
        if stream == PROMPTS:
            self._prompts.last_event = event.to_wire()
        self._streams.note_event(event)
        self._level = max(self._level, level)
        return event
