"""DriftMonitor: owns the feedback store, watches for drift, streams pairs into the fine-tune queue.

A new pair is trained on once, which also scores it. Further passes over it (up to `max_epochs`) are made only while
the drift window says that the model still gets recent preferences wrong. So a quiet stream costs next to
nothing and a change of taste calls for as much training as it needs.

Runs as a Ray actor with several threads; the store is thread-safe, the rest is guarded by one lock. Everything
durable is in the store, so the actor can be killed at any moment.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from alignment.drift import DriftWindow
from alignment.formats import ExportFormat, import_jsonl
from alignment.pair_store import StoredPair
from alignment.pairs import StoredResponse
from alignment.records import FEEDBACK_TYPES
from alignment.store import FeedbackStore
from core.config import AppArgs
from core.errors import StoreUnavailableError
from core.messages import BatchOutcome, TrainingPair
from deployments.metrics import Meter

logger = logging.getLogger(__name__)

STREAM_INTERVAL_S = 0.25
_QUEUE_AHEAD_BATCHES = 4
"""Pairs kept queued ahead of training, in batches: enough to have a choice, few enough to follow new feedback."""
_EXPORT_CHUNK = 1000
_IMPORT_BATCH = 500
_RECORDED_TASKS = 1000


class FineTuneQueue(Protocol):
    """What the monitor needs of the CentralScheduler."""

    def known_pair_ids(self) -> list[str]:
        """Ids that are queued or leased."""
        ...

    def enqueue(self, pairs: list[TrainingPair]) -> None:
        """Add pairs to the queue."""
        ...


class DriftMonitor:
    """See the module docstring. Call `start` after construction; calling it again is harmless."""

    def __init__(self, args: dict[str, Any], queue: FineTuneQueue) -> None:
        self._config = AppArgs.model_validate(args)
        self._queue = queue
        self._window = DriftWindow(self._config.drift)
        self._lock = threading.Lock()
        self._meter = Meter("drift_monitor")
        self._store: FeedbackStore | None = None
        self._stopped = threading.Event()
        self._recorded: deque[str] = deque(maxlen=_RECORDED_TASKS)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin streaming, if it has not begun. The store is opened when it is first needed."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._stream_forever, name="stream", daemon=True)
                self._thread.start()

    def add_feedback(self, items: Sequence[object], idempotency_key: str | None = None) -> list[dict[str, Any]]:
        """Store items; see `FeedbackStore.add`. Outcomes are committed when this returns.

        Raises:
            StoreUnavailableError, InvalidFeedbackError: see `FeedbackStore.add`.
        """
        outcomes = self._open_store().add(items, idempotency_key=idempotency_key)
        for item, outcome in zip(items, outcomes, strict=True):
            kind = item.get("type", "preference") if isinstance(item, dict) else "malformed"
            self._meter.count("feedback_received", type=_known_type(kind), status=outcome.status)
        return [outcome.to_wire() for outcome in outcomes]

    def import_feedback(self, body: bytes) -> dict[str, Any]:
        """Store a JSONL body line by line; returns the report (counts, errors with line numbers)."""
        batch = min(_IMPORT_BATCH, self._config.feedback.max_items)
        return asdict(import_jsonl(body.splitlines(), self._open_store().add, batch))

    def feedback_page(self, after: str | None, limit: int, kind: str | None) -> dict[str, Any]:
        """A stretch of the stored items, oldest first."""
        return asdict(self._open_store().page(after=after, limit=limit, type=kind))

    def export_chunk(self, format: ExportFormat, after: int) -> tuple[list[dict[str, Any]], int | None]:
        """Up to a thousand rows of the export after a position, and the next position; None at the end."""
        return self._open_store().export_chunk(format, after, _EXPORT_CHUNK)

    def put_responses(self, responses: list[StoredResponse]) -> int:
        """Remember responses so that feedback can name them."""
        stored = self._open_store().put_responses(responses)
        self._meter.count("responses_stored", stored)
        return stored

    def held_out_pairs(self) -> list[TrainingPair]:
        """The gate's test set: the newest held-out pairs, the newest of each prompt."""
        return [_training_pair(pair) for pair in self._open_store().held_out_pairs(self._config.gate.max_pairs)]

    def record(self, outcome: BatchOutcome, failed_ids: list[str], version: str | None) -> None:
        """Write down what became of a batch: scores, counts of training, pairs that must be parked."""
        store = self._open_store()
        if outcome.task_id in self._recorded:  # a repeat: the first answer got lost on its way
            return
        if outcome.scores:
            store.mark_trained([score.pair_id for score in outcome.scores], outcome.scores, version)
            with self._lock:
                for score in outcome.scores:
                    self._window.update(score.loss, score.margin)
            self._meter.count("pairs_trained", len(outcome.scores))
        for pair_id, reason in outcome.unusable:
            store.park(pair_id, reason)
        for pair_id in failed_ids:
            store.park(pair_id, outcome.error or "failed")
        self._recorded.append(outcome.task_id)
        self._show_drift()

    def drift(self) -> dict[str, Any]:
        """State of the drift window."""
        with self._lock:
            return {
                "drifted": self._window.drifted,
                "reason": self._window.reason,
                "accuracy": self._window.accuracy,
                "mean_loss": self._window.mean_loss,
            }

    def stats(self) -> dict[str, Any]:
        """Store sizes and drift, for `/v1/training`."""
        return {"store": asdict(self._open_store().counts()), "drift": self.drift()}

    def stream_once(self) -> int:
        """Queue pairs that should be trained on; returns how many."""
        ahead = _QUEUE_AHEAD_BATCHES * self._config.training.pairs_per_step
        known = set(self._queue.known_pair_ids())
        room = ahead - len(known)
        if room <= 0:
            return 0
        pairs = self._open_store().next_training_pairs(room, 1, exclude=known)
        if len(pairs) < room and self.drift()["drifted"]:
            pairs += self._repeats(room - len(pairs), known | {pair.pair_id for pair in pairs})
        if pairs:
            self._queue.enqueue([_training_pair(pair) for pair in pairs])
        return len(pairs)

    def _repeats(self, limit: int, exclude: set[str]) -> list[StoredPair]:
        """Recent pairs for another pass, least trained first: those that the window complains about."""
        training = self._config.training
        recent = self._open_store().recent_training_pairs(training.repeat_pairs)
        again = [
            pair for pair in recent if 0 < pair.times_trained < training.max_epochs and pair.pair_id not in exclude
        ]
        return sorted(again, key=lambda pair: pair.times_trained)[:limit]

    def _open_store(self) -> FeedbackStore:
        with self._lock:
            if self._store is None:
                self._store = FeedbackStore.open(self._config.feedback, self._config.state_dir)
            return self._store

    def _stream_forever(self) -> None:
        while not self._stopped.wait(STREAM_INTERVAL_S):
            try:
                self.stream_once()
                self._meter.refresh()
            except StoreUnavailableError as error:
                logger.warning("no pairs are streamed: %s", error)
                self._stopped.wait(5.0)
            except Exception:  # the stream must outlive a restart of the scheduler actor
                logger.exception("streaming pairs failed, will go on")
                self._stopped.wait(1.0)

    def _show_drift(self) -> None:
        state = self.drift()
        self._meter.set_gauge("drift_detected", float(state["drifted"]))
        if state["accuracy"] is not None:
            self._meter.set_gauge("drift_accuracy", state["accuracy"])


def _training_pair(pair: StoredPair) -> TrainingPair:
    return TrainingPair(pair.pair_id, pair.prompt, pair.chosen, pair.rejected, pair.last_loss, pair.times_trained)


def _known_type(kind: object) -> str:
    """A bounded label: never what a client sent."""
    return kind if isinstance(kind, str) and kind in FEEDBACK_TYPES else "other"
