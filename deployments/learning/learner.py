"""The executor's learning loop: ask for a batch, score or train it, offer a candidate, publish what passes the gate.

The loop runs on the replica's event loop beside the requests; all device work happens inside the engine, slice by
slice. Whatever goes wrong here is a counted, named error of a task; requests never see it.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import InitVar, asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from alignment.versions.registry import AdapterRegistry
from core.config import AppArgs
from core.errors import ConflictError, ControlUnavailableError, EngineUnavailableError, StoreUnavailableError
from core.ports import ControlPort, EnginePort
from core.types import Checkpoint, FineTuneTask, StepMetrics, TaskKind, TaskResult
from core.wire import HORIZON_S, BatchOutcome, ExecutorLoad, Headroom, Rebuild, TrainingBatch
from deployments.learning.candidate import CandidateJudge
from deployments.learning.rebuild import MAX_ATTEMPTS, Rebuilder
from deployments.learning.training_progress import ShadowKeeper
from deployments.monitors.heartbeat import with_heartbeat
from deployments.monitors.metrics import Meter
from deployments.publishing.versions import AdapterVersions, Published
from engine.training.pair_tokens import PairTokenizer

logger = logging.getLogger(__name__)

WAITING_PHASE = "waiting for the engine"
"""The learner's phase until the shadow adapter is restored in an engine that came back."""
_ENGINE_CHECK_S = 0.25
_WAIT_S = 4.0
"""Control is asked anew this often at least: it takes an executor that is silent for longer for gone."""
_CONTROL_BACKOFF_S = 1.0
_MAX_FAILURES_IN_A_ROW = 10
"""After as many failed tasks in a row, training pauses itself until someone resumes it."""
_FAILURE_BACKOFF_S = 1.0
"""Rest after a failed task; doubles with each further failure in a row, up to `_MAX_BACKOFF_S`."""
_MAX_BACKOFF_S = 60.0
_REFUSALS_PER_GENERATION = 4
"""After as many refused candidates in a row training goes on from the parent of the version that it went on from.

Nothing good may be within a few steps of a version: one that was taught by too few pairs passed the gate, and every
candidate made from it repeated itself.
"""
_LEARNT_LOSS = 0.1
"""Mean DPO loss of a step, in nats, from which on more steps teach little: what was learnt is offered early."""
_FEWEST_STEPS = 4
"""Of a candidate that is offered for its small loss."""
_DRAINED_S = 1.0
"""The queue counts as empty after so long without a batch; then what was learnt is offered early."""
_SMOOTHING = 0.2
_BUSY_WINDOW_S = 2.5
"""Time constant of the share of time in which requests were there."""


@dataclass(slots=True)
class LearnerStatus:
    """State and counters of this learner, for `/v1/training`. A restart sets the counters back."""

    phase: str = "idle"
    """idle, scoring, training, rebuilding, evaluating, publishing, backing off, waiting for the engine, pinned or
    paused."""
    paused: bool = False
    pause_reason: str | None = None
    steps: int = 0
    failed_steps: int = 0
    failures_in_a_row: int = 0
    pairs: int = 0
    busy_s: float = 0.0
    longest_slice_s: float = 0.0
    last: StepMetrics | None = None
    last_error: str | None = None
    last_decision: str | None = None
    pairs_per_s: float = 0.0
    """Smoothed over the last steps, from batch to batch while training."""
    task_id: str | None = None
    restored_steps: int = 0
    """`total_steps` of the checkpoint that this process started from."""
    started_at: float = field(default_factory=time.time)


@dataclass(kw_only=True, eq=False, repr=False)
class Learner:
    """The learning loop of one executor."""

    executor_id: str
    engine: EnginePort
    control: ControlPort
    versions: AdapterVersions
    registry: InitVar[AdapterRegistry]
    tokenizer: PairTokenizer
    args: AppArgs
    checkpoint: InitVar[Path]
    """The training state is kept here, step by step."""
    current_load: Callable[[], ExecutorLoad | None] = lambda: None
    status: LearnerStatus = field(default_factory=LearnerStatus, init=False)

    def __post_init__(self, registry: AdapterRegistry, checkpoint: Path) -> None:
        self.shadow = ShadowKeeper(self.engine, self.versions, registry, checkpoint)
        self._judge = CandidateJudge(self.engine, self.versions, registry, self.tokenizer, self.args)
        self.rebuilder = Rebuilder(self.executor_id, self.control, self.args)
        self._beat = partial(self.control.heartbeat, self.executor_id)
        self._meter = Meter("executor")
        self._woken = asyncio.Event()
        """Set when something has happened here after which there may be something to do."""
        self.versions.watch(self._woken.set)
        self._is_drained = False
        self._refusals_in_a_row = 0
        self._rest_until_s = 0.0
        self._busy_share = 0.0
        self._busy_seen_s = time.monotonic()
        self._follow = False
        self._generation = self.engine.generation
        """The engine's when the shadow adapter was restored."""
        self._told_live: str | None = None
        """The live version that Control was told of last."""

    def pause(self, reason: str = "asked for") -> None:
        """Take no further batch. A step in progress ends first."""
        self.status.paused = True
        self.status.pause_reason = reason
        self._woken.set()

    def resume(self) -> None:
        """Go on after a pause."""
        self.status.paused = False
        self.status.pause_reason = None
        self.status.failures_in_a_row = 0
        self._rest_until_s = 0.0
        self._woken.set()

    def follow_live(self) -> None:
        """Someone moved the live pointer: training goes on from there, not from what it was rolled back from."""
        self._follow = True
        self._woken.set()

    def begin_rebuild(self, rebuild: Rebuild) -> None:
        """Learn anew from the base, beginning with the next turn."""
        self.rebuilder.asked = rebuild
        self._woken.set()

    def check_rebuild(self) -> None:
        """Raise a ConflictError if no rebuild can begin now."""
        if self.rebuilder.asked or self.shadow.progress.rebuild:
            raise ConflictError("a rebuild is running already; `mace training` shows how far it is")
        if self.versions.pinned:
            raise ConflictError(
                f"{self.versions.pinned} is pinned, so nothing else can go live: release the pin first"
            )

    def status_to_wire(self) -> dict[str, Any]:
        """Status as built-in types."""
        return {
            **asdict(self.status),
            "steps_since_candidate": self.shadow.progress.steps_since_candidate,
            "total_steps": self.shadow.progress.total_steps,
            "live_version": self.versions.live,
            "last_publish": self.versions.last_publish.to_wire(),
        }

    def silence(self) -> str:
        """The reason for which it asks Control for no work; empty if it does."""
        status = self.status
        if status.paused:
            return f"training is paused: {status.pause_reason}"
        if status.phase == WAITING_PHASE:
            return WAITING_PHASE
        if status.phase == "backing off":
            return f"it rests after a failed task: {status.last_error}"
        return ""

    async def restore(self) -> None:
        """Put the shadow adapter where training left off."""
        generation = self.engine.generation
        await self.shadow.restore()
        self._generation, self._follow = generation, False
        self.status.restored_steps = self.shadow.progress.total_steps

    async def run(self) -> None:
        """The loop. Ends only by cancellation."""
        while True:
            try:
                await self.turn()
                continue
            except (ControlUnavailableError, EngineUnavailableError) as error:
                self.status.last_error = str(error)
            except Exception as error:  # learning must not die of one failed turn
                logger.exception("a turn of the learning loop failed")
                self.status.last_error = f"{type(error).__name__}: {error}"
            await asyncio.sleep(_CONTROL_BACKOFF_S)

    async def turn(self) -> None:
        """One round of `run`: follow what is live, work on a batch if there is one, offer a candidate if it is due."""
        self._woken.clear()
        self._meter.refresh()
        if not await self._has_engine():
            return
        await self.versions.refresh()
        if self._follow or self.shadow.progress.goal != self.versions.training_base:
            if self.shadow.progress.rebuild is None:
                await self.shadow.return_to_base()
            else:
                self.shadow.follow()
            self._follow, self._refusals_in_a_row = False, 0
        if (live := self.versions.live) != self._told_live:
            await self.control.note_live(live, self.tokenizer.fingerprint)
            self._told_live = live
        await self._begin_rebuild()
        backoff_s = self._rest_until_s - time.monotonic()
        if self.status.paused or backoff_s > 0:
            self.status.phase = "paused" if self.status.paused else "backing off"
            await self._rest(_WAIT_S if self.status.paused else min(backoff_s, _WAIT_S))
            return
        batch = await self.control.poll(self._headroom())
        if batch is not None:
            await self._work(batch)
            self._is_drained = False
        if (rebuild := self.shadow.progress.rebuild) is not None:
            await self._rebuild(rebuild)
            return
        if self._is_candidate_due() and self.versions.canary is None:  # one trial at a time
            await self.offer_candidate()
        if batch is None:
            self.status.phase = "pinned" if self.versions.pinned else "idle"
            await self._wait_for_work()

    async def _wait_for_work(self) -> None:
        """Wait until Control has work, or something happens here, or what was learnt may be offered."""
        may_drain = self.shadow.progress.steps_since_candidate > 0 and not self._is_drained
        limit_s = _DRAINED_S if may_drain else _WAIT_S
        waiting = asyncio.ensure_future(self.control.wait_for_work(self._headroom(), limit_s))
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            await asyncio.wait({waiting, woken}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                self._is_drained = not waiting.result()
        finally:
            waiting.cancel()
            woken.cancel()

    async def _rest(self, limit_s: float) -> None:
        """Wait so long, or until something happens here."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), limit_s)

    async def _has_engine(self) -> bool:
        """False, after a while, if the engine is away; one that came back gets the shadow adapter first."""
        if self.engine.is_away:
            self.status.phase = WAITING_PHASE
            await asyncio.sleep(_ENGINE_CHECK_S)
            return False
        if self.engine.generation != self._generation:
            await self.restore()
        return True

    def _is_candidate_due(self) -> bool:
        steps, enough = self.shadow.progress.steps_since_candidate, self.args.training.steps_per_candidate
        if self.status.last is not None and self.status.last.loss < _LEARNT_LOSS:
            enough = min(enough, _FEWEST_STEPS)
        return steps >= enough or (steps > 0 and self._is_drained)

    def _headroom(self) -> Headroom:
        busy = 1.0 if self.engine.num_unfinished_requests() else 0.0
        now_s = time.monotonic()
        gone_s, self._busy_seen_s = now_s - self._busy_seen_s, now_s
        self._busy_share += (1.0 - math.exp(-gone_s / _BUSY_WINDOW_S)) * (busy - self._busy_share)
        free_s = HORIZON_S * (1.0 - self._busy_share)
        # While a version is pinned nothing new can go live: what comes in is scored, and trained after the release.
        refusal = f"{self.versions.pinned} is pinned" if self.versions.pinned else ""
        if self.shadow.progress.rebuild is not None:
            refusal = "it learns anew"
        return Headroom(self.executor_id, self.engine.free_memory_bytes, free_s, self.current_load(), refusal)

    async def _begin_rebuild(self) -> None:
        """Begin what was asked for, once the one that a restart fell into has ended."""
        if (ended := self.shadow.ended_rebuild) is not None:
            await self._end_rebuild(ended, "published", self.shadow.progress.base, "published before a restart")
            self.shadow.ended_rebuild = None
        if (asked := self.rebuilder.asked) is not None:
            await self.shadow.begin_rebuild(asked)
            self.rebuilder.begin()

    async def _rebuild(self, rebuild: Rebuild) -> None:
        """One step of a rebuild; at its end the candidate is offered, once no other version is on trial."""
        pairs, after = await self.rebuilder.next_pairs(rebuild)
        if after is None:
            if self.versions.canary is None:
                await self.offer_candidate()
            else:
                await self._rest(_WAIT_S)
            return
        batch = TrainingBatch(f"rebuild-{rebuild.passes}-{after.after_seq}", tuple(pairs))
        self.status.phase = "rebuilding"
        result, outcome = await self._run(batch, after)
        if _lacked_device(result):
            await self._rest(_WAIT_S)
            return
        if result.error is not None and self.status.failures_in_a_row % MAX_ATTEMPTS:
            return  # again, after a rest
        self.rebuilder.take_scores(result.scores)
        if self.shadow.progress.rebuild is rebuild:  # nothing of it could be trained
            self.shadow.progress = replace(self.shadow.progress, rebuild=after)
        if outcome.unusable:
            await self._report(replace(outcome, scores=()), self.versions.live)
        await self.rebuilder.tell(after, loss=None if result.metrics is None else result.metrics.loss)

    async def _work(self, batch: TrainingBatch) -> None:
        """Score or train a batch and report it."""
        self.status.phase = "training" if batch.kind is TaskKind.TRAIN else "scoring"
        live = self.versions.live
        result, outcome = await self._run(batch)
        if not _lacked_device(result):  # else the next poll gives the batch back, without a failure of its pairs
            await self._report(outcome, live)

    async def _run(self, batch: TrainingBatch, rebuild: Rebuild | None = None) -> tuple[TaskResult, BatchOutcome]:
        """Score or train a batch; `rebuild` is how far a rebuild is once it is trained."""
        is_training = batch.kind is TaskKind.TRAIN
        self.status.task_id = batch.task_id
        live = self.versions.live
        started_s = time.perf_counter()
        pairs, unusable = await asyncio.to_thread(self.tokenizer.tokenize_all, batch.pairs)
        result = TaskResult(batch.task_id, batch.kind)
        if pairs:
            after = replace(self.shadow.progress.after_step(pair.pair_id for pair in pairs), rebuild=rebuild)
            task = FineTuneTask(
                batch.task_id,
                batch.kind,
                pairs,
                on_live=not is_training,
                dpo_loss=batch.dpo_loss,
                attempts=batch.attempts,
                gamma=batch.gamma,
                checkpoint=Checkpoint(str(self.shadow.checkpoint), after.to_wire()) if is_training else None,
            )
            try:
                result = await with_heartbeat(self.engine.run_task(task), self._beat)
            except EngineUnavailableError as error:
                result.error = f"{type(error).__name__}: {error}"
            if not is_training and self.versions.live != live:
                result.scores = ()  # whose they are is not known: the pairs are asked for again
            if _lacked_device(result):
                self.status.last_error = result.error
            else:
                self._note_outcome(result)
            if is_training and result.error is None:
                self.shadow.progress = after
                self._note_step(result, len(pairs), time.perf_counter() - started_s)
        outcome = BatchOutcome(
            batch.task_id,
            self.executor_id,
            scores=result.scores,
            error=result.error,
            busy_s=result.busy_s,
            peak_bytes=result.peak_bytes,
            unusable=unusable,
            kind=batch.kind,
            fingerprint=self.tokenizer.fingerprint,
            reference_keys={pair.pair_id: self.tokenizer.reference_key(pair) for pair in pairs},
        )
        self.status.task_id = None
        return result, outcome

    async def _report(self, outcome: BatchOutcome, live: str) -> None:
        await self._insist(lambda: self.control.complete(outcome, live))

    async def _insist(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Call Control until it has answered: what is done must not be lost to a restart of it."""
        while True:
            try:
                return await with_heartbeat(call(), self._beat)
            except (ControlUnavailableError, StoreUnavailableError) as error:
                self.status.last_error = str(error)
                await asyncio.sleep(_CONTROL_BACKOFF_S)

    def _note_outcome(self, result: TaskResult) -> None:
        """Count a failed task and rest longer after each; training pauses itself after too many in a row."""
        status = self.status
        status.busy_s += result.busy_s
        status.longest_slice_s = result.longest_slice_s
        if result.kind is TaskKind.TRAIN:
            self._meter.count("train_steps", outcome="failed" if result.error else "done")
        self._meter.count("train_busy_seconds", result.busy_s)
        if result.error is None:
            status.failures_in_a_row = 0
            return
        status.failed_steps += 1
        status.last_error = result.error
        status.failures_in_a_row += 1
        backoff_s = _FAILURE_BACKOFF_S * 2 ** (status.failures_in_a_row - 1)
        self._rest_until_s = time.monotonic() + min(backoff_s, _MAX_BACKOFF_S)
        if status.failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
            self.pause(f"{_MAX_FAILURES_IN_A_ROW} failed tasks in a row, the last: {result.error}")

    def _note_step(self, result: TaskResult, num_pairs: int, wall_s: float) -> None:
        """Count an optimizer step; `wall_s` is from the batch's arrival to its end."""
        status, metrics = self.status, result.metrics
        assert metrics is not None  # there is no error
        if result.checkpoint_error is not None:
            status.last_error = result.checkpoint_error
            self._meter.count("checkpoints_failed")
        status.steps += 1
        status.pairs += num_pairs
        status.last = metrics
        rate = num_pairs / max(wall_s, 1e-9)
        status.pairs_per_s += (rate - status.pairs_per_s) * (_SMOOTHING if status.pairs_per_s else 1.0)
        self._meter.set_gauge("train_longest_slice_seconds", result.longest_slice_s)
        self._meter.set_gauge("dpo_loss", metrics.loss)
        self._meter.set_gauge("dpo_margin", metrics.margin)
        self._meter.set_gauge("dpo_accuracy", metrics.accuracy)

    async def offer_candidate(self) -> None:
        """Gate the shadow adapter; publish it or go back to what is live."""
        self.status.phase = "evaluating"
        rebuild = self.shadow.progress.rebuild
        held_out = await self.control.held_out_pairs()
        version, decision = await self._judge.offer(held_out, self.shadow.progress, self.status.last)
        self.status.last_decision = decision.reason
        self._meter.count("adapter_candidates", outcome="published" if decision.accepted else "rejected")
        state = "refused"
        if decision.accepted:
            self.status.phase = "publishing"
            try:
                published = await self.versions.publish(version)
            except EngineUnavailableError:
                raise  # training goes on from the checkpoint, and it is offered again
            except Exception as error:
                self._follow = True  # else it would be offered, and committed, on every turn
                self.shadow.progress = replace(self.shadow.progress, rebuild=None)
                await self._end_rebuild(rebuild, "failed", version.name, str(error))
                raise
            state = "held" if published is Published.BLOCKED else "published"
        if state == "published":
            await self.shadow.begin_at(version.name)
            self._refusals_in_a_row = 0
        else:
            self._refusals_in_a_row += state == "refused" and rebuild is None
            await self.shadow.return_to_base(self._refusals_in_a_row // _REFUSALS_PER_GENERATION)
        await self._end_rebuild(rebuild, state, version.name, decision.reason)

    async def _end_rebuild(self, rebuild: Rebuild | None, state: str, version: str, reason: str) -> None:
        if rebuild is not None:
            await self._insist(lambda: self.rebuilder.tell(rebuild, state, version=version, reason=reason))


def _lacked_device(result: TaskResult) -> bool:
    """The task failed on a device without memory left, whatever was in it."""
    return result.error is not None and result.free_bytes == 0
