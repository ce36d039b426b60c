"""Drift of preferences: what has changed, how alarming that is, and how much training it calls for.

Every new pair is scored by the live adapter before anything is trained on it ("test, then train"). Three signals:

1. the level window (`alignment.drift.window`): whether the live adapter agrees with the newest pairs. Fixed bounds.
2. change detection on streams of scores, of all pairs, each user and each tag (`alignment.drift.streams`).
3. change detection on the prompts (`alignment.drift.input_drift`).

They raise one level in 0..1, which halves with every `HALF_LIFE_PAIRS` scores without a complaint. The level sets the
retrain rate and the weight of the loss in the priority. New pairs earn training slots at that rate, and batches spend
them (`TrainingCredit`).
"""

import math
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from alignment.drift.change_streams import Change
from alignment.drift.input_drift import PROMPTS, InputDrift
from alignment.drift.streams import (
    GLOBAL,
    TRUSTED_WEIGHT,
    DriftEvent,
    ScoredPair,
    ScoreStreams,
    is_score,
    stream_names,
)
from alignment.drift.window import LevelWindow, Score
from core.alignment_config import DriftConfig

HALF_LIFE_PAIRS = 32.0
"""The level halves with every so many scored pairs without a complaint."""
QUIET_GAMMA, ALARM_GAMMA = 0.5, 2.0
"""Factor of `scheduler.gamma` while nothing drifts, and at full alarm."""

_INPUT_LEVEL = 0.5
"""New prompts call for a closer look, not for an alarm."""
_SAVED = ("level", "alarm", "answered", "complained", "version", "version_since_seq", "last_seq", "last_change_seq",
          "last_change", "num_ignored")  # fmt: skip
_ROUNDING = 1e-9
"""Ten times 0.1 is one slot."""
MAX_SLOTS = 256.0
"""Most training slots that are saved up."""
_ANSWERED_LEVEL = 0.5
"""An alarm is over: the level sank to this, or the newest version agrees with its users."""
_MUTED_WINDOWS = 4
"""Distrusted pairs that are remembered, in windows, so that scoring them again does not let them in."""


class DriftTracker:
    """See the module docstring. Deterministic, not thread-safe; the first pair imports river (3 s, 190 MB)."""

    def __init__(self, config: DriftConfig) -> None:
        self._config = config
        self._window = LevelWindow(config)
        self._streams = ScoreStreams()
        self._prompts = InputDrift()
        self._members: deque[tuple[str, ...]] = deque(maxlen=config.window)
        """Streams of the newest trusted pairs: how much of the traffic a user or tag is."""
        self._muted: deque[str] = deque(maxlen=_MUTED_WINDOWS * config.window)
        self.level = 1.0
        """Level of alarm in 0..1. Nothing is known yet: the first pairs of all count as an alarm."""
        self.alarm: str | None = None
        """The last change in the global stream, until it is answered."""
        self.answered = False
        """Another version went live since `alarm`."""
        self.complained = False
        """The present complaint was reported. Until the level is low again: one that wavers is one event."""
        self.version: str | None = None
        """The live version; None before anyone said."""
        self.version_since_seq = 0
        self.last_seq = 0
        """Newest pair observed: after a restart, later ones in the store have to be observed again."""
        self.last_change_seq = 0
        """Pairs after this sequence number belong to the present preferences; 0 if they never changed."""
        self.last_change: dict[str, Any] | None = None
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
        self.last_seq = max(self.last_seq, pair.seq)
        found = self._streams.update(pair)
        if pair.trusted:
            self._window.add(pair.pair_id, Score(pair.loss, pair.margin))
            self._members.append(stream_names(pair))
            self._settle()
            found += self._prompts.update(pair.seq, pair.prompt)
        else:
            self._muted.append(pair.pair_id)
        return self._complaint_event(pair.at) + [self._raise_alarm(*one, pair.at) for one in found]

    def rescore(self, pair_id: str, loss: float, margin: float, version: str) -> None:
        """Take the score that `version` gave a known pair; of a version that is not live it says nothing."""
        if version != self.version:
            return
        if is_score(loss, margin):
            self._rescore(pair_id, Score(loss, margin))
        else:
            self.num_ignored += 1

    def reweigh(self, pair_id: str, weight: float) -> None:
        """Let a known pair that turned out to be less trustworthy leave the window. What it did to streams is done."""
        if not weight >= TRUSTED_WEIGHT and self._window.discard(pair_id):
            self._muted.append(pair_id)

    def forget(self, pair_ids: Iterable[str]) -> None:
        """Let pairs that were deleted or parked leave the window."""
        for pair_id in pair_ids:
            self._window.discard(pair_id)

    def note_live(self, version: str) -> bool:
        """Take note that a version is live; False if that was known.

        The window is void until its pairs (`unscored_ids`) are scored again. The change detectors keep their streams: a
        better adapter is a change for the better, which is no alarm.
        """
        if version == self.version:
            return False
        self.version, self.version_since_seq = version, self.last_seq
        self.answered = True
        self._window.clear_scores()
        return True

    @property
    def unscored_ids(self) -> list[str]:
        """Pairs of the window that the live version has not scored, newest first: what `rescore` waits for."""
        return self._window.unscored_ids

    @property
    def complains(self) -> bool:
        """True if the live adapter, as of now, gets too many of the newest pairs wrong."""
        return self._window.complaint() is not None

    @property
    def drifted(self) -> bool:
        """True if the window complains, or a change in all pairs together is not yet answered."""
        return self.complains or self.alarm is not None

    @property
    def reason(self) -> str:
        """The reason for `drifted`, in words."""
        if self.alarm is not None and not self.complains:
            return self.alarm
        return self._window.verdict()

    @property
    def retrain_rate(self) -> float:
        """Training slots that each new pair earns now."""
        return interpolate(self._config.quiet_rate, self._config.alarm_rate, self.level)

    @property
    def gamma_factor(self) -> float:
        """Factor of `scheduler.gamma`, the weight of the loss in the priority of fine-tune tasks, now."""
        return interpolate(QUIET_GAMMA, ALARM_GAMMA, self.level)

    def to_wire(self) -> dict[str, Any]:
        """The state for people, as `GET /v1/drift` shows it."""
        return {
            "drifted": self.drifted,
            "reason": self.reason,
            "level": self.level,
            "retrain_rate": self.retrain_rate,
            "gamma_factor": self.gamma_factor,
            "live_version": self.version,
            **self._window.means()._asdict(),
            "last_change_seq": self.last_change_seq,
            "last_change": self.last_change,
            "num_ignored": self.num_ignored,
            "streams": self._streams.to_wire(),
            "prompts": self._prompts.to_wire(),
        }

    def to_state(self) -> dict[str, Any]:
        """Everything as JSON, for a restart; at most about 0.7 MB (200 streams of 128 scores, 1,024 global ones)."""
        return {
            "window": self._window.to_state(),
            "streams": self._streams.to_state(),
            "prompts": self._prompts.to_state(),
            "members": [list(names) for names in self._members],
            "muted": list(self._muted),
            **{name: getattr(self, name) for name in _SAVED},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], config: DriftConfig) -> "DriftTracker":
        """Inverse of `to_state`: goes on as if there had been no restart.

        Raises:
            KeyError, TypeError, ValueError: the state is not one of `to_state`.
        """
        tracker = cls(config)
        tracker._window = LevelWindow.from_state(state["window"], config)
        tracker._streams = ScoreStreams.from_state(state["streams"])
        tracker._prompts = InputDrift.from_state(state["prompts"])
        tracker._members.extend(tuple(names) for names in state["members"])
        tracker._muted.extend(state["muted"])
        for name in _SAVED:
            kept = getattr(tracker, name)
            value = state[name] if kept is None else type(kept)(state[name])  # a damaged number is refused here
            setattr(tracker, name, value)
        return tracker

    def _rescore(self, pair_id: str, score: Score) -> None:
        if pair_id not in self._muted and self._window.rescore(pair_id, score):
            self._settle()

    def _settle(self) -> None:
        """Move the level after one trusted score: a complaint keeps it up, else it decays."""
        if self.complains:
            self.level = 1.0
            return
        self.level *= 0.5 ** (1.0 / HALF_LIFE_PAIRS)
        if self.answered and self._window.full_enough:
            self.level = min(self.level, _ANSWERED_LEVEL)
        if self.level <= _ANSWERED_LEVEL:
            self.complained, self.alarm = False, None

    def _complaint_event(self, at: float) -> list[DriftEvent]:
        complaint = self._window.complaint()
        if complaint is None or self.complained:
            return []
        self.complained = True
        event = DriftEvent(at, GLOBAL, "window", self._window.means().accuracy or 0.0, complaint)
        self._streams.note_event(event)
        return [event]

    def _raise_alarm(self, stream: str, change: Change, at: float) -> DriftEvent:
        """A change in all pairs is a full alarm; in one user's or tag's, in proportion to its share of the pairs."""
        detail = change.detail
        if stream == GLOBAL:
            level = 1.0
            self.last_change_seq = change.last_seq_before
            self._window.keep_newest(change.num_rows)
        elif stream == PROMPTS:
            level = _INPUT_LEVEL
            detail += f" (input only: raises the level to {_INPUT_LEVEL} at most)"
        else:
            level = sum(stream in names for names in self._members) / max(1, len(self._members))
            detail += f" ({level:.0%} of the newest pairs)"
        if stream != PROMPTS and change.last_seq_before <= self.version_since_seq < self.last_seq:
            detail += f"; {self.version} went live meanwhile"
        event = DriftEvent(at, stream, change.channel.kind, change.after, detail)
        if stream == GLOBAL:
            self.alarm, self.answered, self.last_change = detail, False, asdict(event)
        if stream == PROMPTS:
            self._prompts.last_event = asdict(event)
        self._streams.note_event(event)
        self.level = max(self.level, level)
        return event


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


class TrainingCredit:
    """A token bucket of training slots; one slot trains one pair once. Never above its bound, never below 0.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._balance = 0.0
        self._lock = threading.Lock()

    @property
    def balance(self) -> float:
        """Slots left, with their fraction."""
        return self._balance

    def earn(self, num_new_pairs: int, rate: float) -> None:
        """Take in slots for new scored training pairs, `rate` for each."""
        earned = num_new_pairs * rate
        if math.isfinite(earned) and earned > 0:
            self.refund(earned)

    def top_up(self, num_slots: int) -> None:
        """Grant slots for another pass: up to `num_slots` in all, so that asking again adds nothing."""
        with self._lock:
            self._balance = max(self._balance, min(MAX_SLOTS, float(num_slots)))

    def spend(self, num_slots: int) -> int:
        """Take up to `num_slots` whole slots; returns how many were there."""
        with self._lock:
            granted = max(0, min(num_slots, int(self._balance + _ROUNDING)))
            self._balance = max(0.0, self._balance - granted)
            return granted

    def refund(self, num_slots: float) -> None:
        """Give back slots that found no pair."""
        with self._lock:
            self._balance = min(MAX_SLOTS, self._balance + max(0, num_slots))

    def to_state(self) -> dict[str, Any]:
        """The balance as JSON."""
        return {"balance": self._balance}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TrainingCredit":
        """Inverse of `to_state`; a smaller bound than before cuts the balance."""
        credit = cls()
        credit.earn(1, float(state["balance"]))
        return credit
