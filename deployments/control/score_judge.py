"""ScoreJudge: what the live adapter's scores mean: drift, quality of feedback, and how much training they call for.

Part of the DriftMonitor; one lock guards it. What it knows is in the store every few seconds, so that a restart goes on
from there; scores that fell in between are in the store too and are only missing from the drift streams.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from alignment.drift.streams import GLOBAL, DriftEvent, ScoredPair
from alignment.drift.tracker import DriftTracker, TrainingCredit
from alignment.quality.monitor import QualityMonitor
from alignment.records.chat import whole_text
from alignment.store.feedback_store import FeedbackStore
from alignment.store.pairs import StoredPair
from alignment.versions.serving_state import BASE
from core.config import AppArgs
from core.wire import BatchOutcome

logger = logging.getLogger(__name__)

_STATE_KEY = "judge"
_SAVE_INTERVAL_S = 5.0
_CATCH_UP_PAIRS = 256
"""Pairs scored between the last saved state and a crash, at most; more of them are missing from the streams."""
_QUIET_CREDIT_BATCHES = 4
_CHANGE_SLOTS = 128
"""Training slots granted at once when a change in all pairs is found, for the pairs since then."""
_ALARM_LEVEL = 0.5
"""Drift levels from here on count as an alarm."""
_ALARM_LOSS = 0.25
"""While alarmed, a pair is trained again until its loss (nats) is below this; while not, `drift.max_loss`. Below it a
new pair teaches nothing, unless the live adapter gets the newest ones wrong."""


class Appetite(NamedTuple):
    """The training that the scores call for."""

    gamma: float
    """Weight of the loss in the priority of fine-tune tasks."""
    is_alarmed: bool
    """New pairs are trained newest first and old lessons repeated, instead of only where the loss is high."""
    is_complaining: bool
    """The live adapter gets the newest preferences wrong, and it is ours to do something about it."""
    min_new_loss: float
    """A pair is worth its first training from this loss on (nats)."""
    min_hard_loss: float
    """A pair is worth another pass from this loss on (nats); the baselines repeat whatever they have."""
    last_change_seq: int
    """Pairs after this position belong to the present preferences."""
    unscored_ids: list[str]
    """Pairs of the drift window that the live version has not scored yet."""
    live_version: str | None
    """Version that executors serve, as the last one that said so; None before anyone did."""


class ScoreJudge:
    """See the module docstring. Thread-safe."""

    def __init__(self, config: AppArgs, store: FeedbackStore, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._store = store
        self._clock = clock
        self._lock = threading.RLock()
        self._quality = QualityMonitor(config.quality, store)
        self._is_baseline = config.scheduler.policy in ("periodic", "continuous")
        self._saved_s = 0.0
        self._unjudged: set[str] = set()
        """Scores of these are stored, and what follows from them is not; a report may have to come twice."""
        saved = store.loop.load_state(_STATE_KEY) or {}
        self._tracker, self.credit = self._restore(saved)
        self._catch_up()

    def appetite(self) -> Appetite:
        """The training that the scores call for now. The baselines have no monitor in charge: theirs is fixed."""
        with self._lock:
            tracker, drift = self._tracker, self._config.drift
            is_alarmed = self._is_baseline or tracker.level >= _ALARM_LEVEL
            is_complaining = tracker.complains and not self._is_baseline
            return Appetite(
                gamma=self._gamma,
                is_alarmed=is_alarmed,
                is_complaining=is_complaining,
                min_new_loss=0.0 if self._is_baseline or is_complaining else _ALARM_LOSS,
                min_hard_loss=0.0 if self._is_baseline else _ALARM_LOSS if is_alarmed else drift.max_loss,
                last_change_seq=tracker.last_change_seq,
                unscored_ids=tracker.unscored_ids,
                live_version=tracker.version,
            )

    def note_live(self, version: str) -> None:
        """Take note that a version is live: its scores are collected anew. Nothing happens if that was known."""
        with self._lock:
            if self._tracker.note_live(version):
                self._save(at_once=True)

    def keep(self) -> None:
        """Write down what is known; by itself that happens every few seconds."""
        with self._lock:
            self._save(at_once=True)

    def take_scores(self, outcome: BatchOutcome, version: str | None) -> None:
        """Keep the scores of a batch that the live adapter `version` gave, and draw the conclusions."""
        with self._lock:
            ids = [score.pair_id for score in outcome.scores]
            before = {pair.pair_id: pair for pair in self._store.pairs.find(ids)}
            self._unjudged |= {pair.pair_id for pair in before.values() if pair.scored_at is None}
            self._store.pairs.record_scores(outcome.scores, stored_version(version), outcome.reference_keys)
            scored = [
                replace(before[score.pair_id], last_loss=score.loss, last_margin=score.margin)
                for score in outcome.scores
                if score.pair_id in before
            ]
            fresh = [pair for pair in scored if pair.pair_id in self._unjudged]
            again = [pair for pair in scored if pair.pair_id not in self._unjudged]
            self._judge_fresh(sorted(fresh, key=lambda pair: pair.seq))
            self._unjudged.difference_update(ids)
            for pair in again:
                self._tracker.rescore(pair.pair_id, *_score(pair), version or BASE)
            self._cool_down()
            self._save()

    def forget(self, pair_ids: Collection[str]) -> None:
        """Let the window not wait for pairs that cannot be scored any more."""
        with self._lock:
            self._tracker.forget(pair_ids)

    def summary(self) -> dict[str, Any]:
        """The global stream, the retrain rate and γ, for `/v1/training`."""
        with self._lock:
            state = self._tracker.to_wire()
            keys = ("drifted", "reason", "level", "accuracy", "mean_loss", "mean_margin")
            return {**{key: state[key] for key in keys}, **self._consequences()}

    def report(self) -> dict[str, Any]:
        """Everything but the history, for `/v1/drift`."""
        with self._lock:
            return {
                **self._tracker.to_wire(),
                **self._consequences(),
                "distrusted_users": self._quality.user_report(),
            }

    def _consequences(self) -> dict[str, float]:
        """Rates that follow from the drift level; for a baseline they are fixed."""
        return {"retrain_rate": self._retrain_rate, "gamma": self._gamma, "training_credit": self.credit.balance}

    @property
    def _retrain_rate(self) -> float:
        """Training slots that each new pair earns."""
        return self._config.drift.alarm_rate if self._is_baseline else self._tracker.retrain_rate

    @property
    def _gamma(self) -> float:
        return self._config.scheduler.gamma * (1.0 if self._is_baseline else self._tracker.gamma_factor)

    def _judge_fresh(self, pairs: Sequence[StoredPair]) -> None:
        """Draw the conclusions from pairs scored for the first time, in order of arrival."""
        changes = self._quality.assess(pairs) if pairs else []
        for change in changes:
            self._tracker.reweigh(change.pair_id, change.quality)
        weights = {change.pair_id: change.quality for change in changes}
        events: list[DriftEvent] = []
        for pair in pairs:
            weight = weights.get(pair.pair_id, pair.quality)
            events += self._tracker.observe(_observation(pair, weight, self._clock()))
            if pair.split == "train" and weight > 0:
                self.credit.earn(1, self._retrain_rate)
        if any(event.stream == GLOBAL and event.kind != "window" for event in events):
            self.credit.top_up(_CHANGE_SLOTS)
        if events:
            self._store.loop.put_drift_events(events)
            for event in events:
                logger.info("drift in stream %s: %s", event.stream, event.detail)

    def _cool_down(self) -> None:
        """Once the live adapter agrees with its users, what is left of an alarm's credit would train for nothing."""
        if not self._is_baseline and self._tracker.level < _ALARM_LEVEL:
            keep = _QUIET_CREDIT_BATCHES * self._config.training.pairs_per_step
            self.credit.spend(int(self.credit.balance) - keep)

    def _catch_up(self) -> None:
        """Observe what was scored after the saved state: a crash must not hide a change of preferences."""
        newest = self._store.sampling.newest_scored(_CATCH_UP_PAIRS)
        missed = [pair for pair in reversed(newest) if pair.seq > self._tracker.last_seq]
        for pair in missed:
            self._tracker.observe(_observation(pair, pair.quality, pair.scored_at or self._clock()))
            if pair.split == "train" and pair.times_trained == 0:
                self.credit.earn(1, self._retrain_rate)

    def _restore(self, saved: dict[str, Any]) -> tuple[DriftTracker, TrainingCredit]:
        try:
            tracker = DriftTracker.from_state(saved["tracker"], self._config.drift)
            return tracker, TrainingCredit.from_state(saved["credit"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if saved:
                logger.warning("drift state is not readable, it starts afresh: %r", error)
            return DriftTracker(self._config.drift), TrainingCredit()

    def _save(self, *, at_once: bool = False) -> None:
        now_s = time.monotonic()
        if at_once or now_s - self._saved_s >= _SAVE_INTERVAL_S:
            self._saved_s = now_s
            state = {"tracker": self._tracker.to_state(), "credit": self.credit.to_state()}
            self._store.loop.save_state(_STATE_KEY, state)


def _observation(pair: StoredPair, weight: float, at: float) -> ScoredPair:
    prompt = whole_text(pair.prompt, pair.tools)
    return ScoredPair(pair.pair_id, pair.seq, *_score(pair), prompt, pair.user, pair.tags, weight, at)


def _score(pair: StoredPair) -> tuple[float, float]:
    """Loss and margin; the store keeps null for what is not finite."""
    loss, margin = pair.last_loss, pair.last_margin
    return math.nan if loss is None else loss, math.nan if margin is None else margin


def stored_version(version: str | None) -> str | None:
    """A version as the store names it: None for the bare base model."""
    return None if version == BASE else version
