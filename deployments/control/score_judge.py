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
from typing import Any

from alignment.drift.streams import GLOBAL, DriftEvent, ScoredPair
from alignment.drift.tracker import DriftTracker, TrainingCredit
from alignment.quality.monitor import QualityMonitor
from alignment.records.chat import whole_text
from alignment.store.feedback_store import FeedbackStore
from alignment.store.pairs import StoredPair
from alignment.versions.activation_log import BASE
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
_ALARM_LOSS = 0.25
"""While alarmed, a pair is trained again until its loss (nats) is below this; while not, `drift.max_loss`."""


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
        self._tracker, self._credit = self._restore(saved)
        self._catch_up()

    @property
    def live_version(self) -> str | None:
        """Version that executors serve now, as the last one that said so; None before anyone did."""
        return self._tracker.live_version

    @property
    def retrain_rate(self) -> float:
        """Training slots that each new pair earns. The baselines have no monitor in charge: theirs is fixed."""
        return self._config.drift.alarm_rate if self._is_baseline else self._tracker.retrain_rate

    @property
    def gamma(self) -> float:
        """Weight of the loss in the priority of fine-tune tasks now."""
        factor = 1.0 if self._is_baseline else self._tracker.gamma_factor
        return self._config.scheduler.gamma * factor

    @property
    def is_alarmed(self) -> bool:
        """True if new pairs are trained newest first and old lessons repeated, not only where the loss is high."""
        return self._is_baseline or self._tracker.level >= 0.5

    @property
    def is_complaining(self) -> bool:
        """True if the live adapter gets the newest preferences wrong, and the monitor is in charge of training."""
        with self._lock:
            return not self._is_baseline and self._tracker.complains

    @property
    def unscored_ids(self) -> list[str]:
        """Pairs of the drift window that the live version has not scored yet."""
        with self._lock:
            return self._tracker.unscored_ids

    @property
    def min_hard_loss(self) -> float:
        """A pair is worth another pass from this loss on (nats); the baselines repeat whatever they have."""
        if self._is_baseline:
            return 0.0
        return _ALARM_LOSS if self.is_alarmed else self._config.drift.max_loss

    @property
    def last_change_seq(self) -> int:
        """Pairs after this position belong to the present preferences."""
        return self._tracker.last_change_seq

    def note_live(self, version: str) -> None:
        """Take note that a version is live: its scores are collected anew. Nothing happens if that was known."""
        with self._lock:
            if self._tracker.note_live(version):
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
            for pair_id in pair_ids:
                self._tracker.forget(pair_id)

    def grant(self, num_slots: int) -> int:
        """Take up to `num_slots` training slots from the credit; returns how many there were."""
        with self._lock:
            return self._credit.spend(num_slots)

    def give_back(self, num_slots: int) -> None:
        """Return slots that found no pair."""
        with self._lock:
            self._credit.refund(num_slots)

    def top_up(self, num_slots: int) -> None:
        """Grant credit for another pass over the newest pairs, because the live adapter still gets them wrong."""
        with self._lock:
            self._credit.top_up(num_slots)

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
        """What follows from the drift level, or for a baseline is fixed."""
        return {"retrain_rate": self.retrain_rate, "gamma": self.gamma, "training_credit": self._credit.balance}

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
                self._credit.earn(1, self.retrain_rate)
        if any(event.stream == GLOBAL and event.kind != "window" for event in events):
            self._credit.top_up(_CHANGE_SLOTS)
        if events:
            self._store.loop.put_drift_events(events)
            for event in events:
                logger.info("drift in stream %s: %s", event.stream, event.detail)

    def _cool_down(self) -> None:
        """Once the live adapter agrees with its users, what is left of an alarm's credit would train for nothing."""
        if not self.is_alarmed:
            keep = _QUIET_CREDIT_BATCHES * self._config.training.pairs_per_step
            self._credit.spend(int(self._credit.balance) - keep)

    def _catch_up(self) -> None:
        """Observe what was scored after the saved state: a crash must not hide a change of preferences."""
        newest = self._store.sampling.newest_scored(_CATCH_UP_PAIRS)
        missed = [pair for pair in reversed(newest) if pair.seq > self._tracker.last_seq]
        for pair in missed:
            self._tracker.observe(_observation(pair, pair.quality, pair.scored_at or self._clock()))
            if pair.split == "train" and pair.times_trained == 0:
                self._credit.earn(1, self.retrain_rate)

    def _restore(self, saved: dict[str, Any]) -> tuple[DriftTracker, TrainingCredit]:
        try:
            tracker = DriftTracker.from_state(saved["tracker"], self._config.drift)
            return tracker, TrainingCredit.from_state(saved["credit"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if saved:
                logger.warning(
                    "drift state is not readable, it starts afresh: %s: %s", type(error).__name__, error
                )
            return DriftTracker(self._config.drift), TrainingCredit()

    def _save(self, *, at_once: bool = False) -> None:
        now_s = time.monotonic()
        if at_once or now_s - self._saved_s >= _SAVE_INTERVAL_S:
            self._saved_s = now_s
            state = {"tracker": self._tracker.to_state(), "credit": self._credit.to_state()}
            self._store.loop.save_state(_STATE_KEY, state)


def _observation(pair: StoredPair, weight: float, at: float) -> ScoredPair:
    loss, margin = _score(pair)
    return ScoredPair(
        pair_id=pair.pair_id,
        seq=pair.seq,
        loss=loss,
        margin=margin,
        prompt=whole_text(pair.prompt),
        user=pair.user,
        tags=pair.tags,
        weight=weight,
        at=at,
    )


def _score(pair: StoredPair) -> tuple[float, float]:
    """Loss and margin; the store keeps null for what is not finite."""
    loss, margin = pair.last_loss, pair.last_margin
    return math.nan if loss is None else loss, math.nan if margin is None else margin


def stored_version(version: str | None) -> str | None:
    """A version as the store names it: None for the bare base model."""
    return None if version == BASE else version
