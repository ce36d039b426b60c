"""DriftMonitor: owns the feedback store, watches for drift, and streams pairs into the fine-tune queue.

Every new pair is scored by the live adapter first; `ScoreJudge` draws the conclusions, `PairStream` chooses what is
trained. Runs as a Ray actor with several threads; the store is thread-safe, the rest is guarded by locks. Everything
durable is in the store, so the actor can be killed at any moment.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from alignment.records.feedback import FEEDBACK_TYPES
from alignment.records.pairs import StoredResponse
from alignment.store.feedback_store import FeedbackStore
from alignment.store.formats import ExportFormat, export_chunk, import_jsonl
from alignment.store.pairs import PENDING
from core.config import AppArgs
from core.errors import ConflictError, MaceError, StoreUnavailableError
from core.types import TaskKind
from core.wire import BatchOutcome, HeldOutPairs, Rebuild, TrainingPair
from deployments.control.central_scheduler import LEASE_S, CentralScheduler
from deployments.control.pair_stream import PairStream, training_pair
from deployments.control.score_judge import ScoreJudge
from deployments.monitors.metrics import Meter

logger = logging.getLogger(__name__)

_STREAM_INTERVAL_S = 0.1
"""Pairs are streamed when something has happened, and not again within this time."""
_REFRESH_S = 8.0
"""Gauges are set again this often (`Meter.refresh`), and pairs streamed: a scheduler may have died unnoticed."""
_EXPORT_CHUNK = 1000
_RECORDED_TASKS = 1000
_MAX_HISTORY = 1000
_MAX_OLD_PAIRS = 64
"""Held-out pairs before the newest ones that the gate looks at, a sample."""


class DriftMonitor:
    """See the module docstring. Call `start` after construction; calling it again is harmless."""

    def __init__(self, config: AppArgs, queue: CentralScheduler) -> None:
        self._config = config
        self._queue = queue
        self._lock = threading.Lock()
        self._meter = Meter("drift_monitor")
        self._stream: PairStream | None = None
        """Made when the store can be opened, with the store and the judge."""
        self._rebuild: dict[str, Any] | None = None
        """The last report of the rebuild that ran last, in this process's time."""
        self._rebuild_told_s = 0.0
        self._recorded: deque[str] = deque(maxlen=_RECORDED_TASKS)
        self._thread: threading.Thread | None = None
        self._is_due = threading.Event()
        """There may be something to stream."""

    def start(self) -> None:
        """Begin streaming, if it has not begun. The store is opened when it is first needed."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._stream_forever, name="stream", daemon=True)
                self._thread.start()

    def add_feedback(self, items: Sequence[object], idempotency_key: str | None = None) -> list[dict[str, Any]]:
        """Store items; outcomes are committed when this returns. Raises what `FeedbackLog.add` does."""
        outcomes = self._open().store.feedback.add(items, idempotency_key=idempotency_key)
        self.stream_soon()
        for item, outcome in zip(items, outcomes, strict=True):
            kind = item.get("type", "preference") if isinstance(item, dict) else "malformed"
            label = kind if isinstance(kind, str) and kind in FEEDBACK_TYPES else "other"  # not what a client sent
            self._meter.count("feedback_received", type=label, status=outcome.status)
        return [asdict(outcome) for outcome in outcomes]

    def import_feedback(self, body: bytes, dry_run: bool = False) -> dict[str, Any]:
        """Store a JSONL body line by line; returns the report (counts, errors with line numbers).

        With `dry_run` the report is the same, and nothing is stored.
        """
        log = self._open().store.feedback
        if dry_run:
            return asdict(log.rehearse(lambda add: import_jsonl(body.splitlines(), add)))
        report = asdict(import_jsonl(body.splitlines(), log.add))
        self.stream_soon()
        return report

    def feedback_page(self, after: str | None, limit: int, kind: str | None) -> dict[str, Any]:
        """A stretch of the stored items, oldest first."""
        return asdict(self._open().store.feedback.page(after=after, limit=limit, type=kind))

    def export_chunk(self, format: ExportFormat, after: int) -> tuple[list[dict[str, Any]], int | None]:
        """Up to a thousand rows of the export after a position, and the next position; None at the end."""
        return export_chunk(self._open().store.pairs, format, after, _EXPORT_CHUNK)

    def put_responses(self, responses: list[StoredResponse]) -> int:
        """Remember responses so that feedback can name them."""
        stored = self._open().store.responses.put(responses)
        self._meter.count("responses_stored", stored)
        return stored

    def held_out_pairs(self) -> HeldOutPairs:
        """The gate's test set: the newest held-out pairs, and a sample of those before, back to the last change."""
        gate, parts = self._config.gate, self._open()
        since_seq, seed = parts.judge.appetite().last_change_seq, self._config.training.seed
        recent, old = parts.store.sampling.held_out(gate.max_pairs, _MAX_OLD_PAIRS, since_seq, seed)
        return HeldOutPairs(tuple(map(training_pair, recent)), tuple(map(training_pair, old)))

    def note_live(self, version: str, fingerprint: str = "") -> None:
        """Take note of the version that executors serve; after a change the newest pairs are scored again.

        `fingerprint` is their base model's (empty: not said). Of another one than before nothing is known: every pair
        is new, and drift starts afresh or where it was when that model was served last.
        """
        parts = self._open()
        if fingerprint and fingerprint != parts.store.models.served():
            parts.judge.keep()
        if fingerprint and parts.store.models.begin(fingerprint):
            logger.info("another base model is served than before: what pairs taught starts from there")
            self._queue.clear()
            with self._lock:
                self._stream = parts = self._new_stream(parts.store)
        parts.judge.note_live(version)
        self.stream_soon()

    def begin_rebuild(self, executor_id: str, users: Sequence[str]) -> Rebuild:
        """Leave the pairs of these users out, take all others in, and say what there is to learn anew.

        Raises:
            ConflictError: a rebuild is running, a user has no pair, or nothing is left to learn from.
        """
        parts = self._open()
        with self._lock:
            before, now_s = self._rebuild, time.monotonic()
            if before is not None and before["state"] == "running" and now_s - self._rebuild_told_s < LEASE_S:
                raise ConflictError(f"a rebuild is running on {before['executor_id']}")
            self._rebuild = {"state": "running", "executor_id": executor_id}
            self._rebuild_told_s = now_s
        try:
            number, newest = parts.store.pairs.leave_out(users)
        except MaceError:
            self._rebuild = before
            raise
        queued = self._queue.known_pair_ids()["train"]
        out = [pair.pair_id for pair in parts.store.pairs.find(queued) if pair.state != PENDING]
        parts.judge.credit.refund(self._queue.withdraw(out))
        self.stream_soon()
        return Rebuild(tuple(users), number, newest, min(parts.judge.appetite().last_change_seq, newest))

    def relearning_pairs(self, after: int, until: int, limit: int) -> list[tuple[int, TrainingPair]]:
        """The next pairs of positions in (after, until] that may be trained on, each with its position."""
        found = self._open().store.pairs.to_relearn(after, until, limit)
        return [(pair.seq, training_pair(pair)) for pair in found]

    def note_rebuild(self, report: dict[str, Any]) -> None:
        """Take note of how far a rebuild is; if its version goes live or on trial, its pairs count as trained once."""
        if report["state"] == "published":
            self._open().store.pairs.mark_relearnt(report["until_seq"])
        self._rebuild, self._rebuild_told_s = report, time.monotonic()

    def record(self, outcome: BatchOutcome, failed_ids: list[str], version: str | None) -> None:
        """Write down what became of a batch: scores, counts of training, pairs that must be parked.

        Scores of a training step are those of the shadow adapter, which may be refused; it is named after the live
        `version` that it is based on, with a plus.
        """
        parts = self._open()
        if outcome.task_id in self._recorded:  # a repeat: the first answer got lost on its way
            return
        if outcome.fingerprint and outcome.fingerprint != parts.store.models.served():
            return
        if outcome.scores and outcome.kind is TaskKind.TRAIN:
            ids = [score.pair_id for score in outcome.scores]
            parts.store.pairs.mark_trained(ids, outcome.scores, f"{version}+")
            self._meter.count("pairs_trained", len(outcome.scores))
        elif outcome.scores:
            parts.judge.take_scores(outcome, version)
            self._meter.count("pairs_scored", len(outcome.scores))
        for pair_id, reason in outcome.unusable:
            parts.store.pairs.park(pair_id, reason)
        for pair_id in failed_ids:
            parts.store.pairs.park(pair_id, outcome.error or "failed")
        self._recorded.append(outcome.task_id)
        self._show(parts.judge)

    def drift(self, limit: int = 50, stream: str | None = None) -> dict[str, Any]:
        """The state of all streams, what follows from it, and the newest events; for `/v1/drift`."""
        parts = self._open()
        events = parts.store.loop.drift_events(min(max(limit, 0), _MAX_HISTORY), stream)
        return {**parts.judge.report(), "history": [asdict(event) for event in events]}

    def stats(self) -> dict[str, Any]:
        """Store sizes, drift and the last rebuild, for `/v1/training`."""
        parts = self._open()
        drift = parts.judge.summary()
        return {"store": asdict(parts.store.counts()), "drift": drift, "rebuild": self._rebuild}

    def rating_counts(self, since_s: float) -> dict[str | None, tuple[int, int]]:
        """Thumbs up and down since a time (Unix seconds), by adapter version; see `FeedbackLog.rating_counts`."""
        return self._open().store.feedback.rating_counts(since_s)

    def stream_soon(self) -> None:
        """Something has happened after which pairs may have to be queued: the stream looks at once."""
        self._is_due.set()

    def stream_once(self) -> int:
        """Queue pairs that should be scored or trained on; returns how many."""
        return self._open().stream_once()

    def _open(self) -> PairStream:
        """The stream, with its store and its judge; StoreUnavailableError: not now, the next call tries again."""
        with self._lock:
            if self._stream is None:
                self._stream = self._new_stream(FeedbackStore.open(self._config.feedback, self._config.state_dir))
            return self._stream

    def _new_stream(self, store: FeedbackStore) -> PairStream:
        return PairStream(self._config, store, ScoreJudge(self._config, store), self._queue)

    def _stream_forever(self) -> None:
        while True:
            self._is_due.clear()
            try:
                self.stream_once()
                self._meter.refresh()
            except StoreUnavailableError as error:
                logger.warning("no pairs are streamed: %s", error)
                time.sleep(5.0)
                continue
            except Exception:  # the stream must outlive a restart of the scheduler actor
                logger.exception("streaming pairs failed, will go on")
                time.sleep(1.0)
                continue
            time.sleep(_STREAM_INTERVAL_S)
            self._is_due.wait(_REFRESH_S)

    def _show(self, judge: ScoreJudge) -> None:
        state = judge.summary()
        self._meter.set_gauge("drift_detected", float(state["drifted"]))
        self._meter.set_gauge("drift_level", state["level"])
        self._meter.set_gauge("retrain_rate", state["retrain_rate"])
        if state["accuracy"] is not None:
            self._meter.set_gauge("drift_accuracy", state["accuracy"])
