"""The executor's learning loop: ask for a batch, train on it, offer a candidate, publish what passes the gate.

The loop runs on the replica's event loop beside the requests; all device work happens inside the engine, slice by
slice. Whatever goes wrong here is a counted, named error of a task; requests never see it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment.adapter_files import AdapterManifest
from alignment.gate import GateDecision, judge_candidate
from alignment.registry import AdapterRegistry, AdapterVersion
from core.config import AppArgs
from core.errors import AdapterError, ControlUnavailableError, StoreUnavailableError, TrainingError
from core.messages import HORIZON_S, BatchOutcome, ExecutorLoad, Headroom, TrainingBatch, TrainingPair
from core.ports import ControlPort, EnginePort
from core.types import FineTuneTask, PairScore, TaskKind, TaskResult, TokenizedPair
from deployments.learner_status import LearnerStatus
from deployments.metrics import Meter
from deployments.versions import BASE, AdapterVersions
from engine.pair_tokens import PairTokenizer

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.25
_CONTROL_BACKOFF_S = 1.0
_MAX_FAILURES_IN_A_ROW = 10
"""After as many failed batches in a row, training pauses itself until someone resumes it."""
_DRAINED_POLLS = 4
"""The queue counts as empty after so many polls without a batch; then what was learnt is offered early."""


class Learner:
    """One per executor. `run` until cancelled."""

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
        current_load: Callable[[], ExecutorLoad | None] = lambda: None,
    ) -> None:
        self._executor_id = executor_id
        self._engine = engine
        self._control = control
        self._versions = versions
        self._registry = registry
        self._tokenizer = tokenizer
        self._args = args
        self._base_model = base_model
        self._current_load = current_load
        self._state_dir = args.state_dir / "training"
        self._idle_polls = 0
        self._meter = Meter("executor")
        self._failures_in_a_row = 0
        self._candidate_pairs: list[str] = []
        self._busy_share = 0.0
        self._follow = False
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

    def status_to_wire(self) -> dict[str, Any]:
        """The status as built-in types."""
        publish = asdict(self._versions.last_publish)
        return {**asdict(self.status), "live_version": self._versions.live, "last_publish": publish}

    async def restore(self) -> None:
        """Put the shadow adapter where training left off: the live version, with its optimizer state if saved."""
        if self._versions.live == BASE or not await self._engine.load_training_state(self._state_path()):
            await self._return_to_live()

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
        if await self._versions.follow_registry() or self._follow:
            self._follow = False
            self._forget_candidate()
            await self._return_to_live()
        if self.status.paused:
            self.status.phase = "paused"
            await asyncio.sleep(POLL_INTERVAL_S)
            return
        batch = await self._control.poll(self._headroom())
        if batch is not None:
            await self._train(batch)
        self._idle_polls = 0 if batch is not None else self._idle_polls + 1
        due = self.status.steps_since_candidate >= self._args.training.steps_per_candidate
        drained = self._idle_polls >= _DRAINED_POLLS and self.status.steps_since_candidate > 0
        if due or drained:
            await self._offer_candidate()
        if batch is None:
            self.status.phase = "idle"
            await asyncio.sleep(POLL_INTERVAL_S)

    def _headroom(self) -> Headroom:
        busy = 1.0 if self._engine.num_unfinished_requests() else 0.0
        self._busy_share += 0.1 * (busy - self._busy_share)
        free_s = HORIZON_S * (1.0 - self._busy_share)
        return Headroom(self._executor_id, self._engine.free_memory_bytes, free_s, self._current_load())

    async def _train(self, batch: TrainingBatch) -> None:
        self.status.phase, self.status.task_id = "training", batch.task_id
        started_s = time.perf_counter()
        pairs, unusable = self._tokenize(batch.pairs)
        result: TaskResult | None = None
        if pairs:
            task = FineTuneTask(
                batch.task_id, TaskKind.TRAIN, tuple(pairs), dpo_loss=batch.dpo_loss, attempts=batch.attempts
            )
            result = await self._engine.run_task(task)
        self._note(result, len(pairs), time.perf_counter() - started_s)
        if result is not None and result.error is None:
            self._candidate_pairs += [pair.pair_id for pair in pairs]
        await self._report(batch, result, unusable)
        self.status.task_id = None

    async def _report(
        self, batch: TrainingBatch, result: TaskResult | None, unusable: list[tuple[str, str]]
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
        )
        while True:  # the step is done: its record must not be lost to a restart of Control
            try:
                await self._control.complete(outcome, self._versions.live)
            except (ControlUnavailableError, StoreUnavailableError) as error:
                self.status.last_error = str(error)
                await asyncio.sleep(_CONTROL_BACKOFF_S)
            else:
                return

    def _tokenize(self, pairs: tuple[TrainingPair, ...]) -> tuple[list[TokenizedPair], list[tuple[str, str]]]:
        usable, unusable = [], []
        for pair in pairs:
            try:
                usable.append(self._tokenizer.tokenize(pair))
            except TrainingError as error:
                unusable.append((pair.pair_id, f"{type(error).__name__}: {error}"))
        return usable, unusable

    def _note(self, result: TaskResult | None, num_pairs: int, wall_s: float) -> None:
        status = self.status
        if result is None:
            return
        status.busy_s += result.busy_s
        status.longest_slice_s = result.longest_slice_s
        self._meter.count("train_steps", outcome="failed" if result.error else "done")
        self._meter.count("train_busy_seconds", result.busy_s)
        if result.metrics is None:
            status.failed_steps += 1
            status.last_error = result.error
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
                self.pause(f"{_MAX_FAILURES_IN_A_ROW} failed steps in a row, the last: {result.error}")
            return
        self._failures_in_a_row = 0
        status.steps += 1
        status.steps_since_candidate += 1
        status.pairs += num_pairs
        status.last = result.metrics
        rate = num_pairs / max(wall_s, 1e-9)
        status.pairs_per_s = (
            rate if status.pairs_per_s == 0 else status.pairs_per_s + 0.2 * (rate - status.pairs_per_s)
        )
        self._meter.set_gauge("train_longest_slice_seconds", result.longest_slice_s)
        self._meter.set_gauge("dpo_loss", result.metrics.loss)
        self._meter.set_gauge("dpo_margin", result.metrics.margin)
        self._meter.set_gauge("dpo_accuracy", result.metrics.accuracy)

    async def _offer_candidate(self) -> None:
        """Gate the shadow adapter on held-out pairs; publish it or go back to what is live."""
        self.status.phase = "evaluating"
        decision = await self._judge()
        self.status.last_decision = decision.reason
        self._meter.count("adapter_candidates", outcome="published" if decision.accepted else "rejected")
        self.status.phase = "publishing"
        version = await self._commit(decision)
        self._forget_candidate()
        if decision.accepted:
            await self._versions.publish(version)
            await self._save_state()
        else:
            await self._return_to_live()

    async def _judge(self) -> GateDecision:
        held_out, _ = self._tokenize(tuple(await self._control.held_out_pairs()))
        try:
            live = await self._score(held_out, on_live=True)
            candidate = await self._score(held_out, on_live=False)
        except TrainingError as error:  # it must not be offered again and again
            return GateDecision(False, f"it could not be evaluated: {error}")
        return judge_candidate(candidate, live, self._args.gate)

    def _forget_candidate(self) -> None:
        self.status.steps_since_candidate = 0
        self._candidate_pairs = []

    async def _score(self, pairs: list[TokenizedPair], *, on_live: bool) -> tuple[PairScore, ...]:
        if not pairs:
            return ()
        task_id = f"evaluate-{'live' if on_live else 'candidate'}"
        result = await self._engine.run_task(FineTuneTask(task_id, TaskKind.EVALUATE, tuple(pairs), on_live))
        if result.error is not None:
            raise TrainingError(f"held-out pairs cannot be scored: {result.error}")
        return result.scores

    async def _commit(self, decision: GateDecision) -> AdapterVersion:
        manifest = AdapterManifest(
            parent=None if self._versions.live == BASE else self._versions.live,
            base_model=self._base_model,
            status="published" if decision.accepted else "rejected",
            reason=decision.reason,
            pair_ids=tuple(dict.fromkeys(self._candidate_pairs)),
            optimizer_steps=self.status.steps_since_candidate,
            metrics=self.status.candidate_metrics(decision),
            config={
                "lora": self._args.lora.model_dump(mode="json"),
                "training": self._args.training.model_dump(mode="json"),
            },
        )
        staging = await asyncio.to_thread(self._registry.begin)
        try:
            await self._engine.save_adapter(staging, self._base_model)
            return await asyncio.to_thread(self._registry.commit, staging, manifest)
        except BaseException:
            await asyncio.to_thread(self._registry.abandon, staging)
            raise

    def follow_live(self) -> None:
        """Someone moved the live pointer: training goes on from there, not from what it was rolled back from."""
        self._follow = True

    def _state_path(self) -> Path:
        """Training state belongs to a version: after a roll-back it must not be mistaken for another one's."""
        return self._state_dir / f"{self._versions.live}.safetensors"

    async def _save_state(self) -> None:
        await self._engine.save_training_state(self._state_path())
        for path in self._state_dir.glob("*.safetensors"):
            if path != self._state_path():
                path.unlink(missing_ok=True)

    async def _return_to_live(self) -> None:
        """Set the shadow adapter to the live version, so that training goes on from the last good state."""
        live = self._versions.live
        directory: Path | None = None
        if live != BASE:
            directory = (await asyncio.to_thread(self._registry.get, live)).path
        try:
            await self._engine.load_adapter(directory)
        except AdapterError as error:
            logger.warning("shadow adapter starts afresh: %s", error)
            await self._engine.load_adapter(None)
