"""The executor's learning loop: ask for a batch, score or train it, offer a candidate, publish what passes the gate.

The loop runs on the replica's event loop beside the requests; all device work happens inside the engine, slice by
slice. Whatever goes wrong here is a counted, named error of a task; requests never see it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from alignment.versions.registry import AdapterRegistry
from core.config import AppArgs
from core.errors import ControlUnavailableError, StoreUnavailableError
from core.ports import ControlPort, EnginePort
from core.types import Checkpoint, FineTuneTask, TaskKind, TaskResult, TokenizedPair
from core.wire import HORIZON_S, BatchOutcome, ExecutorLoad, Headroom, TrainingBatch
from deployments.learning.candidate import CandidateJudge
from deployments.learning.shadow_keeper import ShadowKeeper
from deployments.learning.status import LearnerStatus
from deployments.learning.tokenizing import PairBatcher, Unusable
from deployments.monitors.heartbeat import with_heartbeat
from deployments.monitors.metrics import Meter
from deployments.publishing.versions import AdapterVersions, Published
from engine.training.pair_tokens import PairTokenizer

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.25
_CONTROL_BACKOFF_S = 1.0
_MAX_FAILURES_IN_A_ROW = 10
"""After as many failed tasks in a row, training pauses itself until someone resumes it."""
_MAX_BACKOFF_S = 60.0
_REFUSALS_PER_GENERATION = 4
"""After as many refused candidates in a row training goes on from the parent of the version that it went on from.

Nothing good may be within a few steps of a version: one that was taught by too few pairs passed the gate, and every
candidate made from it repeated itself.
"""
_DRAINED_POLLS = 4
"""The queue counts as empty after so many polls without a batch; then what was learnt is offered early."""


class Learner:
    """One per executor. `run` until cancelled. `checkpoint` is where the training state is kept, step by step."""

    def __init__(
        self,
        *,
        executor_id: str,
        engine: EnginePort,
        control: ControlPort,
        versions: AdapterVersions,
        registry: AdapterRegistry,
        tokenizer: PairTokenizer,
        args: AppArgs,
        base_model: str,
        checkpoint: Path,
        current_load: Callable[[], ExecutorLoad | None] = lambda: None,
    ) -> None:
        self._executor_id = executor_id
        self._engine = engine
        self._control = control
        self._versions = versions
        self._args = args
        self._shadow = ShadowKeeper(engine, versions, registry, checkpoint)
        self._current_load = current_load
        self._batcher = PairBatcher(tokenizer, base_model, args.model.dtype)
        self._judge = CandidateJudge(engine, versions, registry, self._batcher, args)
        self._idle_polls = 0
        self._meter = Meter("executor")
        self._failures_in_a_row = 0
        self._refusals_in_a_row = 0
        self._rest_until_s = 0.0
        self._busy_share = 0.0
        self._follow = False
        self._unsaid_live: str | None = None
        """The version that went live and that Control has not been told of yet."""
        versions.watch_live(self._note_live)
        self.status = LearnerStatus()

    def pause(self, reason: str = "asked for") -> None:
        """Take no further batch. A step in progress ends first."""
        self.status.paused = True
        self.status.pause_reason = reason

    def resume(self) -> None:
        """Go on after a pause."""
        self.status.paused = False
        self.status.pause_reason = None
        self._failures_in_a_row = 0
        self._rest_until_s = 0.0

    def follow_live(self) -> None:
        """Someone moved the live pointer: training goes on from there, not from what it was rolled back from."""
        self._follow = True

    def status_to_wire(self) -> dict[str, Any]:
        """The status as built-in types."""
        return {
            **asdict(self.status),
            "steps_since_candidate": self._shadow.progress.steps_since_candidate,
            "total_steps": self._shadow.progress.total_steps,
            "failures_in_a_row": self._failures_in_a_row,
            "live_version": self._versions.live,
            "last_publish": asdict(self._versions.last_publish),
        }

    async def restore(self) -> None:
        """Put the shadow adapter where training left off."""
        await self._shadow.restore()
        self.status.restored_steps = self._shadow.progress.total_steps

    async def run(self) -> None:
        """The loop. Ends only by cancellation."""
        while True:
            try:
                await self._turn()
            except ControlUnavailableError as error:
                self.status.last_error = str(error)
                await asyncio.sleep(_CONTROL_BACKOFF_S)
            except Exception as error:  # learning must not die of one failed turn
                logger.exception("a turn of the learning loop failed")
                self.status.last_error = f"{type(error).__name__}: {error}"
                await asyncio.sleep(_CONTROL_BACKOFF_S)

    async def _turn(self) -> None:
        self._meter.refresh()
        await self._versions.refresh()
        if self._follow or self._shadow.progress.goal != self._versions.training_base:
            await self._shadow.return_to_base()
            self._follow, self._refusals_in_a_row = False, 0
        if (version := self._unsaid_live) is not None:
            await self._control.note_live(version)
            if self._unsaid_live == version:
                self._unsaid_live = None
        if self.status.paused or time.monotonic() < self._rest_until_s:
            self.status.phase = "paused" if self.status.paused else "backing off"
            await asyncio.sleep(POLL_INTERVAL_S)
            return
        batch = await self._control.poll(self._headroom())
        if batch is not None:
            await self._work(batch)
        self._idle_polls = 0 if batch is not None else self._idle_polls + 1
        if self._is_candidate_due() and self._versions.canary is None:  # one trial at a time
            await self._offer_candidate()
        if batch is None:
            self.status.phase = "pinned" if self._versions.pinned else "idle"
            await asyncio.sleep(POLL_INTERVAL_S)

    def _note_live(self, version: str) -> None:
        self._unsaid_live = version

    def _is_candidate_due(self) -> bool:
        steps = self._shadow.progress.steps_since_candidate
        is_drained = self._idle_polls >= _DRAINED_POLLS
        return steps >= self._args.training.steps_per_candidate or (steps > 0 and is_drained)

    def _headroom(self) -> Headroom:
        busy = 1.0 if self._engine.num_unfinished_requests() else 0.0
        self._busy_share += 0.1 * (busy - self._busy_share)
        free_s = HORIZON_S * (1.0 - self._busy_share)
        # While a version is pinned nothing new can go live: what comes in is scored, and trained after the release.
        may_train = not self._versions.pinned
        return Headroom(self._executor_id, self._engine.free_memory_bytes, free_s, self._current_load(), may_train)

    async def _work(self, batch: TrainingBatch) -> None:
        """Score or train a batch and report it."""
        is_training = batch.kind is TaskKind.TRAIN
        self.status.phase, self.status.task_id = "training" if is_training else "scoring", batch.task_id
        live = self._versions.live
        started_s = time.perf_counter()
        pairs, unusable = await asyncio.to_thread(self._batcher.tokenize, batch.pairs)
        result: TaskResult | None = None
        if pairs:
            after = self._shadow.progress.after_step(pair.pair_id for pair in pairs)
            task = FineTuneTask(
                batch.task_id,
                batch.kind,
                tuple(pairs),
                on_live=not is_training,
                dpo_loss=batch.dpo_loss,
                attempts=batch.attempts,
                gamma=batch.gamma,
                checkpoint=Checkpoint(str(self._shadow.checkpoint), after.to_wire()) if is_training else None,
            )
            result = await with_heartbeat(self._engine.run_task(task), self._beat)
            if not is_training and self._versions.live != live:
                result = replace(result, scores=())  # whose they are is not known: the pairs are asked for again
            self._note_outcome(result)
            if is_training and result.error is None:
                self._shadow.progress = after
                self._note_step(result, len(pairs), time.perf_counter() - started_s)
        await self._report(batch, result, pairs, unusable, live)
        self.status.task_id = None

    async def _beat(self) -> None:
        await self._control.heartbeat(self._executor_id)

    async def _report(
        self,
        batch: TrainingBatch,
        result: TaskResult | None,
        pairs: list[TokenizedPair],
        unusable: Unusable,
        live: str,
    ) -> None:
        outcome = BatchOutcome(
            task_id=batch.task_id,
            executor_id=self._executor_id,
            scores=result.scores if result else (),
            metrics=result.metrics if result else None,
            error=result.error if result else None,
            busy_s=result.busy_s if result else 0.0,
            peak_bytes=result.peak_bytes if result else 0,
            unusable=tuple(unusable),
            kind=batch.kind,
            reference_keys=self._batcher.reference_keys(pairs),
        )
        while True:  # the step is done: its record must not be lost to a restart of Control
            try:
                await with_heartbeat(self._control.complete(outcome, live), self._beat)
            except (ControlUnavailableError, StoreUnavailableError) as error:
                self.status.last_error = str(error)
                await asyncio.sleep(_CONTROL_BACKOFF_S)
            else:
                return

    def _note_outcome(self, result: TaskResult) -> None:
        """Count a failed task and rest longer after each; training pauses itself after too many in a row."""
        status = self.status
        status.busy_s += result.busy_s
        status.longest_slice_s = result.longest_slice_s
        if result.kind is TaskKind.TRAIN:
            self._meter.count("train_steps", outcome="failed" if result.error else "done")
        self._meter.count("train_busy_seconds", result.busy_s)
        if result.error is None:
            self._failures_in_a_row = 0
            return
        status.failed_steps += 1
        status.last_error = result.error
        self._failures_in_a_row += 1
        backoff_s = self._args.training.failure_backoff_s * 2 ** (self._failures_in_a_row - 1)
        self._rest_until_s = time.monotonic() + min(backoff_s, _MAX_BACKOFF_S)
        if self._failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
            self.pause(f"{_MAX_FAILURES_IN_A_ROW} failed tasks in a row, the last: {result.error}")

    def _note_step(self, result: TaskResult, num_pairs: int, wall_s: float) -> None:
        metrics = result.metrics
        assert metrics is not None  # there is no error
        if result.checkpoint_error is not None:
            self.status.last_error = result.checkpoint_error
            self._meter.count("checkpoints_failed")
        self.status.note_step(metrics, num_pairs, wall_s)
        self._meter.set_gauge("train_longest_slice_seconds", result.longest_slice_s)
        self._meter.set_gauge("dpo_loss", metrics.loss)
        self._meter.set_gauge("dpo_margin", metrics.margin)
        self._meter.set_gauge("dpo_accuracy", metrics.accuracy)

    async def _offer_candidate(self) -> None:
        """Gate the shadow adapter; publish it or go back to what is live."""
        self.status.phase = "evaluating"
        held_out = await self._control.held_out_pairs()
        version, decision = await self._judge.offer(held_out, self._shadow.progress, self.status.last)
        self.status.last_decision = decision.reason
        self._meter.count("adapter_candidates", outcome="published" if decision.accepted else "rejected")
        if decision.accepted:
            self.status.phase = "publishing"
            try:
                published = await self._versions.publish(version)
            except Exception:
                self._follow = True  # else it would be offered, and committed, on every turn
                raise
            if published is not Published.BLOCKED:
                await self._shadow.begin_at(version.name)
                self._refusals_in_a_row = 0
                return
        else:
            self._refusals_in_a_row += 1
        await self._shadow.return_to_base(self._refusals_in_a_row // _REFUSALS_PER_GENERATION)
