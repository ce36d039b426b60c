"""CentralScheduler: the global fine-tune queue, and its best-fit packing onto executors.

The queue holds preference pairs in three roles (new, hard, replay), each ordered by `P_ft(t) + γ·L_DPO`. When an
executor asks for work, its share of each role becomes one batch, and best-fit packing over the executors' reported
headroom says whether this executor is the one. Pairs that wait for their first scores are handed out in between:
scoring is cheap, and what is not scored has no `L_DPO` yet. A leased batch that is not heard of again returns.

Requests are routed by `deployments.routing.router`, which has the same numbers and the same function as `placement`
in the status, and goes on when this actor is away.

Everything here can be rebuilt: the DriftMonitor owns the durable state and streams pairs again after a restart.
`now_s` comes from the clock that is passed in, so the class is plain and testable; `deployments.control.deployment`
makes it a Ray actor.
"""

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from core.config import AppArgs
from core.types import TaskKind
from core.wire import ROLE_SHARES, BatchOutcome, Headroom, TrainingBatch, TrainingPair
from deployments.monitors.metrics import Meter
from scheduler.packing import Bin, Demand, best_fit, first_fit
from scheduler.placement import RankedExecutor, choose_executor
from scheduler.queues.finetune import MixedQueue, QueuedTask, ScoringQueue

logger = logging.getLogger(__name__)

LEASE_S = 60.0
"""A batch goes to another executor when its own has not been heard of for so long; see `heartbeat`."""
MAX_ATTEMPTS = 3
"""A pair that fails as often is parked."""
_HEADROOM_TTL_S = 5.0
_SMOOTHING = 0.2
_AGEING_S = 1.0
"""While pairs wait, which of them is first is looked at this often: priorities age at different rates."""
_SCORE_STEPS = 2
"""A batch to score has at most so many steps' worth of pairs: a forward pass each, about a third of training them."""
_LONG_S = 60.0
"""While work waits for so long and none is leased, the log says why."""
_GIB = 1 << 30
_UNKNOWN_MEMORY_BYTES = float(1 << 60)
"""Stands for the infinite free memory that executors report until they know; f has no value at infinity."""


@dataclass(frozen=True, slots=True)
class _Lease:
    batch: TrainingBatch
    executor_id: str
    expires_s: float
    attempts: dict[str, int]
    """Failures of each pair so far."""


class CentralScheduler:
    """Queue, leases and packing. Methods are quick and run one at a time; only `wait_for_work` lets others in."""

    def __init__(self, config: AppArgs, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._changed = asyncio.Event()
        """Set when someone who waits for work may have got some."""
        self.clear()
        self._headrooms: dict[str, tuple[float, Headroom]] = {}
        self._busy_s_per_pair = 0.0
        self._bytes_per_batch = 0.0
        self._meter = Meter("central_scheduler")

    def clear(self) -> None:
        """Forget all pairs, those that are leased too: what is known of them is of another base model."""
        config = self._config
        self._queue: MixedQueue[TrainingPair] = MixedQueue(config.experiments, config.scheduler.gamma, ROLE_SHARES)
        self._to_score: ScoringQueue[TrainingPair] = ScoringQueue()
        self._scored_last = False
        self._gamma = config.scheduler.gamma
        self._leases: dict[str, _Lease] = {}
        self._standing_since_s: float | None = None
        """Since then there is work and none of it is leased."""
        self._is_logged = False
        self._refusals: dict[str, str] = {}
        """What kept work from each executor that asked last, by its id."""

    def enqueue(self, pairs: list[TrainingPair]) -> None:
        """Add pairs; those already queued or leased are left as they are."""
        now_s = self._clock()
        leased = self._leased_ids()
        for pair in pairs:
            if pair.pair_id not in self._queue and pair.pair_id not in leased:
                self._queue.push(QueuedTask(pair.pair_id, pair, now_s, pair.dpo_loss), pair.role)
        self._note_standing()
        self._changed.set()
        self._meter.set_gauge("finetune_queue_pairs", len(self._queue))

    def withdraw(self, pair_ids: list[str]) -> int:
        """Take pairs out of the queue that should not be trained after all; returns how many were in it."""
        return sum([self._queue.remove(pair_id) for pair_id in pair_ids])

    def enqueue_scoring(self, pairs: list[TrainingPair]) -> None:
        """Add pairs to be scored by the live adapter; those that wait for it already are left as they are."""
        leased = self._leased_ids(TaskKind.EVALUATE)
        for pair in pairs:
            if pair.pair_id not in leased:
                self._to_score.push(pair.pair_id, pair)
        self._note_standing()
        self._changed.set()

    def set_gamma(self, gamma: float) -> None:
        """Set the weight of the loss in the priority of everything queued."""
        if gamma != self._gamma:
            self._gamma = gamma
            self._queue.set_gamma(gamma)
        self._meter.set_gauge("finetune_gamma", gamma)

    def known_pair_ids(self) -> dict[str, list[str]]:
        """Ids of all pairs that are queued or leased, under `train` and `score`."""
        self._return_leases()
        return {
            "train": [*self._queue.ids(), *self._leased_ids(TaskKind.TRAIN)],
            "score": [*self._to_score.ids(), *self._leased_ids(TaskKind.EVALUATE)],
        }

    def poll(self, headroom: Headroom) -> TrainingBatch | None:
        """Lease work to an executor; None if nothing is due, or another executor fits better."""
        self._meter.refresh()
        self._return_leases(lambda lease: lease.executor_id == headroom.executor_id)  # it restarted and forgot
        kind, size = self._work_for(headroom)
        if kind is TaskKind.EVALUATE:
            pairs, num_attempts = self._to_score.pop_batch(_SCORE_STEPS * self._config.training.pairs_per_step)
            attempts = {pair.pair_id: num_attempts for pair in pairs}
            return self._lease(headroom.executor_id, TaskKind.EVALUATE, pairs, attempts)
        if kind is None:
            return None
        tasks = self._queue.pop_batch(size)
        self._meter.set_gauge("finetune_queue_pairs", len(self._queue))
        attempts = {task.task_id: task.attempts for task in tasks}
        return self._lease(headroom.executor_id, TaskKind.TRAIN, [task.payload for task in tasks], attempts)

    async def wait_for_work(self, headroom: Headroom, limit_s: float) -> bool:
        """Wait until `poll` with this headroom would lease something; False if it would not after `limit_s` seconds.

        Nothing is leased, so an executor that dies or looks away meanwhile takes no work with it. What falls due by
        itself ends the wait at its time.
        """
        give_up_s = self._clock() + limit_s
        while True:
            self._return_leases()
            if any(lease.executor_id == headroom.executor_id for lease in self._leases.values()):
                return False  # it is at work: whoever asked this has given up
            if self._work_for(headroom)[0] is not None:
                return True
            now_s = self._clock()
            if now_s >= give_up_s:
                return False
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(give_up_s, self.next_due_s()) - now_s)

    def next_due_s(self) -> float:
        """Time on the clock when there may be work without anybody's doing; infinite if there will be none."""
        now_s, top = self._clock(), self._queue.peek()
        ends_s = [lease.expires_s for lease in self._leases.values()]
        if top is not None:
            aged_s = top.arrived_s + self._config.training.max_age_s
            ends_s.append(min(now_s + _AGEING_S, aged_s if aged_s > now_s else math.inf))
        return min(ends_s, default=math.inf)

    def heartbeat(self, executor_id: str) -> None:
        """Renew the lease of an executor that still works on its batch: a step may take longer than a lease."""
        expires_s = self._clock() + LEASE_S
        for task_id, lease in self._leases.items():
            if lease.executor_id == executor_id:
                self._leases[task_id] = replace(lease, expires_s=expires_s)

    def failed_for_good(self, outcome: BatchOutcome) -> list[str]:
        """Ids of the batch's pairs that failed as often as allowed and must be parked. Changes nothing."""
        lease = self._leases.get(outcome.task_id)
        if lease is None or outcome.error is None:
            return []
        if lease.batch.kind is TaskKind.EVALUATE and len(lease.batch.pairs) > 1:
            return []  # the bad pair of a batch is found by scoring them one by one
        return [pair_id for pair_id, attempts in lease.attempts.items() if attempts + 1 >= MAX_ATTEMPTS]

    def complete(self, outcome: BatchOutcome) -> None:
        """Close a lease. A failed batch goes back with one more attempt, which lowers its priority."""
        failed_for_good = set(self.failed_for_good(outcome))
        lease = self._leases.pop(outcome.task_id, None)
        self._note_standing()
        self._changed.set()
        self._meter.count("finetune_batches", outcome="failed" if outcome.error else "trained")
        if lease is None:
            return
        pairs = lease.batch.pairs
        if outcome.error is not None:
            unusable = failed_for_good | {pair_id for pair_id, _ in outcome.unusable}
            self._requeue(lease, [pair for pair in pairs if pair.pair_id not in unusable], failures=1)
        elif lease.batch.kind is TaskKind.TRAIN:
            self._busy_s_per_pair = _smooth(self._busy_s_per_pair, outcome.busy_s / len(pairs))
            self._bytes_per_batch = _smooth(self._bytes_per_batch, outcome.peak_bytes)

    def stats(self) -> dict[str, Any]:
        """Queue length, leases, executors, and how they rank for a prompt of one token, for `/v1/training`."""
        top, experiments, tau_mem = self._queue.peek(), self._config.experiments, self._config.scheduler.tau_mem
        loads = [room.load for room in self._fresh_headrooms(self._clock()) if room.load is not None]
        return {
            "queued_pairs": len(self._queue),
            "queued_by_role": self._queue.lengths(),
            "pairs_to_score": len(self._to_score),
            "gamma": self._gamma,
            "leased_batches": len(self._leases),
            "standstill": self._standstill(),
            "executors": sorted(self._headrooms),
            "placement": [_to_wire(ranked) for ranked in choose_executor(1, loads, {}, tau_mem)],
            "top_priority": None if top is None else top.priority_at(self._clock(), self._gamma, experiments),
        }

    def _work_for(self, headroom: Headroom) -> tuple[TaskKind | None, int]:
        """What an executor that is free would get now, and the pairs of a step; takes note of its headroom."""
        now_s = self._clock()
        self._headrooms[headroom.executor_id] = (now_s, headroom)
        size = min(len(self._queue), self._config.training.pairs_per_step)
        refusal = self._refusal(headroom, size, now_s)
        kind = TaskKind.TRAIN if not refusal else None
        # Alternately, if both wait; without any memory nothing runs.
        if self._to_score and headroom.memory_bytes > 0 and (refusal or not self._scored_last):
            kind = TaskKind.EVALUATE
        self._refusals[headroom.executor_id] = refusal if kind is None else ""
        self._note_standing()
        return kind, size

    def _refusal(self, headroom: Headroom, size: int, now_s: float) -> str:
        """What keeps a training batch from an executor that is free; empty: nothing does."""
        if headroom.memory_bytes <= 0:
            return "it has no memory left for training; `mace doctor --plan` says what to change"
        if headroom.refusal:
            return headroom.refusal
        if not self._is_due(size, now_s):
            training = self._config.training
            return f"{size} of {training.pairs_per_step} pairs, and none has waited {training.max_age_s:g} s"
        return self._misfit(headroom, size, now_s)

    def _is_due(self, size: int, now_s: float) -> bool:
        if size >= self._config.training.pairs_per_step:
            return True
        top = self._queue.peek()
        return top is not None and (
            top.payload.times_trained > 0 or now_s - top.arrived_s >= self._config.training.max_age_s
        )

    def _misfit(self, headroom: Headroom, size: int, now_s: float) -> str:
        """Why best fit over all free executors does not choose this one; empty: it does."""
        tau_mem = self._config.scheduler.tau_mem
        busy = {lease.executor_id for lease in self._leases.values()}
        bins = [
            Bin(room.executor_id, tau_mem * min(room.memory_bytes, _UNKNOWN_MEMORY_BYTES), room.latency_s)
            for room in self._fresh_headrooms(now_s)
            if room.executor_id not in busy
        ]
        # Memory is a hard limit. Time is not: a step can be interrupted, so it may be longer than any free window.
        able = [one for one in bins if one.memory_capacity_bytes >= self._bytes_per_batch]
        longest_s = max((one.latency_capacity_s for one in able), default=0.0)
        demand = Demand(self._bytes_per_batch, min(self._busy_s_per_pair * size, longest_s))
        fit = first_fit if self._config.experiments.packing == "first_fit" else best_fit
        chosen = fit(demand, bins)
        if chosen is not None and chosen.bin_id == headroom.executor_id:
            return ""
        if chosen is None:
            may_have, wanted = tau_mem * headroom.memory_bytes / _GIB, self._bytes_per_batch / _GIB
            return f"a batch takes {wanted:.2f} GiB of device memory, and it may have {may_have:.2f} GiB"
        return f"{chosen.bin_id} fits better, and has not asked for it yet"

    def _note_standing(self) -> None:
        """Start or stop the clock of a standstill; after a while the log has its reasons, once."""
        if self._leases or not (self._queue or self._to_score):
            self._standing_since_s, self._is_logged = None, False
            return
        now_s = self._clock()
        if self._standing_since_s is None:
            self._standing_since_s = now_s
        if not self._is_logged and now_s - self._standing_since_s >= _LONG_S:
            self._is_logged = True
            logger.warning("no work has been leased for %.0f s: %s", _LONG_S, "; ".join(self._reasons(now_s)))

    def _standstill(self) -> dict[str, Any] | None:
        """How long there has been work without any of it leased, and why; None while some is, or there is none."""
        self._return_leases()
        self._note_standing()
        if self._standing_since_s is None:
            return None
        now_s = self._clock()
        return {"for_s": now_s - self._standing_since_s, "reasons": self._reasons(now_s)}

    def _reasons(self, now_s: float) -> list[str]:
        if not self._headrooms:
            return ["no executor has asked for work yet"]
        fresh = {room.executor_id for room in self._fresh_headrooms(now_s)}
        silent = {
            name: f"it has not asked for work for {now_s - seen_s:.0f} s"
            for name, (seen_s, _) in self._headrooms.items()
            if name not in fresh
        }
        reasons = silent | {name: self._refusals.get(name, "") for name in fresh}
        return [f"{name}: {reason or 'it is about to ask again'}" for name, reason in sorted(reasons.items())]

    def _fresh_headrooms(self, now_s: float) -> list[Headroom]:
        """Reports that are young enough to count, ordered by executor id."""
        fresh = [room for seen_s, room in self._headrooms.values() if now_s - seen_s <= _HEADROOM_TTL_S]
        return sorted(fresh, key=lambda room: room.executor_id)

    def _lease(
        self, executor_id: str, kind: TaskKind, pairs: Sequence[TrainingPair], attempts: dict[str, int]
    ) -> TrainingBatch:
        name = "score" if kind is TaskKind.EVALUATE else "ft"
        task_id = f"{name}-{uuid.uuid4().hex[:12]}"
        batch = TrainingBatch(task_id, tuple(pairs), max(attempts.values()), kind, self._gamma)
        self._leases[task_id] = _Lease(batch, executor_id, self._clock() + LEASE_S, attempts)
        self._scored_last = kind is TaskKind.EVALUATE
        return batch

    def _leased_ids(self, kind: TaskKind = TaskKind.TRAIN) -> set[str]:
        batches = [lease.batch for lease in self._leases.values() if lease.batch.kind is kind]
        return {pair.pair_id for batch in batches for pair in batch.pairs}

    def _return_leases(self, is_over: Callable[[_Lease], bool] = lambda _: False) -> None:
        """Put pairs of leases that expired, or are over, back into the queue."""
        now_s = self._clock()
        for task_id, lease in list(self._leases.items()):
            if lease.expires_s <= now_s or is_over(lease):
                del self._leases[task_id]
                self._requeue(lease, lease.batch.pairs, failures=0)

    def _requeue(self, lease: _Lease, pairs: Iterable[TrainingPair], failures: int) -> None:
        for pair in pairs:
            attempts = lease.attempts[pair.pair_id] + failures
            if lease.batch.kind is TaskKind.EVALUATE:
                self._to_score.push(pair.pair_id, pair, attempts)
            else:
                task = QueuedTask(pair.pair_id, pair, self._clock(), pair.dpo_loss, attempts)
                self._queue.push(task, pair.role)


def _to_wire(ranked: RankedExecutor) -> dict[str, Any]:
    known = math.isfinite(ranked.predicted_ttft_s)
    return {**asdict(ranked), "predicted_ttft_s": ranked.predicted_ttft_s if known else None}


def _smooth(mean: float, value: float) -> float:
    return value if mean == 0.0 else mean + _SMOOTHING * (value - mean)
