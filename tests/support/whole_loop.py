"""Control, learner and engine of one server in one process and one thread, turn by turn; only serving is left out.

Monitor, scheduler, learner, gate, registry and trainer are the real objects. Ray is replaced by direct calls, vLLM by
`InProcessEngine`, and the scheduler's clock by one that moves a second with every turn, so that a course is repeatable.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.store.feedback_store import FeedbackStore
from alignment.store.pairs import StoredPair
from alignment.versions.registry import AdapterRegistry
from core.config import AppArgs
from core.types import FineTuneTask, PairScore, TaskKind, TokenizedPair
from core.wire import BatchOutcome, Headroom, HeldOutPairs, TrainingBatch, TrainingPair
from deployments.control.central_scheduler import CentralScheduler
from deployments.control.drift_monitor import DriftMonitor
from deployments.learning.learner import Learner
from deployments.learning.training_progress import claim_checkpoint
from deployments.publishing.versions import AdapterVersions
from engine.training.pair_tokens import PairTokenizer
from tests.support.in_process_engine import InProcessEngine

BASE_MODEL = "tiny"
_QUIET_TURNS = 3
_MAX_TURNS = 2000
"""Of one round; a loop that is still at work then does not come to rest."""


class InProcessControl:
    """`core.ports.ControlPort`: the calls of `deployments.control.deployment.Control`, in its order, without Ray."""

    def __init__(self, monitor: DriftMonitor, scheduler: CentralScheduler) -> None:
        self._monitor = monitor
        self._scheduler = scheduler

    async def poll(self, headroom: Headroom) -> TrainingBatch | None:
        return self._scheduler.poll(headroom)

    async def wait_for_work(self, headroom: Headroom, limit_s: float) -> bool:
        return await self._scheduler.wait_for_work(headroom, 0.0)

    async def heartbeat(self, executor_id: str) -> None:
        self._scheduler.heartbeat(executor_id)

    async def complete(self, outcome: BatchOutcome, version: str | None) -> None:
        failed = self._scheduler.failed_for_good(outcome)
        self._monitor.record(outcome, failed, version)
        self._scheduler.complete(outcome)

    async def held_out_pairs(self) -> HeldOutPairs:
        return self._monitor.held_out_pairs()

    async def note_live(self, version: str, fingerprint: str = "") -> None:
        self._monitor.note_live(version, fingerprint)

    async def relearning_pairs(self, after: int, until: int, limit: int) -> list[tuple[int, TrainingPair]]:
        return self._monitor.relearning_pairs(after, until, limit)

    async def note_rebuild(self, report: dict[str, Any]) -> None:
        self._monitor.note_rebuild(report)


@dataclass(frozen=True)
class TestScore:
    """One adapter on the test items, which are nobody's feedback. Means over the items."""

    __test__ = False

    accuracy: float
    """A margin of exactly 0, which is all that the bare base has, counts as half right."""
    margin: float
    clpd: float
    """Nats."""
    is_right: tuple[bool, ...]
    """Item by item: is the margin above zero?"""


class WholeLoop:
    """One server's loop. Call `open` first, then `post` and `settle` in turns; `close` at the end."""

    def __init__(
        self, args: AppArgs, model_dir: Path, test_items: Sequence[dict[str, Any]] = (), fingerprint: str = ""
    ) -> None:
        self.args = args
        self.scheduler = CentralScheduler(args, clock=lambda: self._now_s)
        self.monitor = DriftMonitor(args, self.scheduler)
        self.tokenizer = PairTokenizer.load(
            str(model_dir), args.training, BASE_MODEL, args.model.dtype, fingerprint
        )
        self.engine = InProcessEngine(model_dir, args, end_tokens(model_dir))
        self.registry = AdapterRegistry.open(args.state_dir / "adapters", BASE_MODEL, fingerprint)
        self.versions = AdapterVersions(self.engine, self.registry, "m", args.versions)
        checkpoint, self._lock = claim_checkpoint(args.state_dir / "training", fingerprint)
        self.learner = Learner(
            executor_id="e",
            engine=self.engine,
            control=InProcessControl(self.monitor, self.scheduler),
            versions=self.versions,
            registry=self.registry,
            tokenizer=self.tokenizer,
            args=args,
            checkpoint=checkpoint,
        )
        self._now_s = 0.0
        self._num_items = 0
        self.test_pairs = [self.tokenized(item) for item in test_items]

    async def open(self) -> None:
        await self.versions.attach({})
        await self.learner.restore()

    def close(self) -> None:
        """Give the checkpoint back, for another loop to go on from."""
        os.close(self._lock)

    def post(self, items: Sequence[dict[str, Any]]) -> None:
        outcomes = self.monitor.add_feedback(items)
        assert all(outcome["status"] == "accepted" for outcome in outcomes), outcomes

    async def settle(self) -> None:
        """Turn by turn until nothing is left to score, train or offer."""
        quiet = 0
        for _ in range(_MAX_TURNS):
            num_streamed = self.monitor.stream_once()
            await self.learner.turn()
            self._now_s += 1.0
            quiet = 0 if num_streamed or self._is_busy() else quiet + 1
            if quiet == _QUIET_TURNS:
                return
        raise AssertionError(f"still at work: {self.learner.status_to_wire()}, {self.scheduler.stats()}")

    def stored_pairs(self) -> list[StoredPair]:
        """Every pair that was ever scored, newest first, as the disk has it."""
        with self._store() as store:
            return store.sampling.newest_scored(10_000)

    def num_unscored(self) -> int:
        """Stored pairs that no adapter has scored."""
        with self._store() as store:
            return len(store.sampling.unscored_pairs(10_000))

    async def test(self, version: str | None) -> TestScore:
        """How a version does on the test items; None is the bare base."""
        await self.engine.set_live(None if version is None else self.registry.get(version).path)
        try:
            return await self._score(on_live=True)
        finally:
            live = self.registry.live()
            await self.engine.set_live(None if live is None else live.path)

    async def test_shadow(self) -> TestScore:
        """How the adapter in training does on the test items."""
        return await self._score(on_live=False)

    def tokenized(self, item: dict[str, Any]) -> TokenizedPair:
        """A preference as the trainer gets it."""
        self._num_items += 1
        pair = TrainingPair(f"item-{self._num_items}", item["prompt"], item["chosen"], item["rejected"])
        return self.tokenizer.tokenize(pair)

    @contextmanager
    def _store(self) -> Iterator[FeedbackStore]:
        store = FeedbackStore.open(self.args.feedback, self.args.state_dir)
        try:
            yield store
        finally:
            store.close()

    def _is_busy(self) -> bool:
        status, queue = self.learner.status_to_wire(), self.scheduler.stats()
        if self.learner.shadow.progress.rebuild or self.learner.rebuilder.asked:
            return True
        left = queue["queued_pairs"] + queue["pairs_to_score"] + queue["leased_batches"]
        return bool(left or status["steps_since_candidate"] or status["phase"] != "idle")

    async def _score(self, *, on_live: bool) -> TestScore:
        task = FineTuneTask("test", TaskKind.EVALUATE, tuple(self.test_pairs), on_live=on_live)
        result = await self.engine.run_task(task)
        assert result.error is None, result.error
        return _test_score(result.scores)


def end_tokens(model_dir: Path) -> list[int]:
    """What ends an answer of that model."""
    from transformers import GenerationConfig

    eos = GenerationConfig.from_pretrained(str(model_dir)).eos_token_id
    return list(eos) if isinstance(eos, list) else [eos]


def _test_score(scores: Sequence[PairScore]) -> TestScore:
    number = len(scores)
    rights = [1.0 if score.margin > 0 else 0.5 if score.margin == 0 else 0.0 for score in scores]
    return TestScore(
        accuracy=sum(rights) / number,
        margin=sum(score.margin for score in scores) / number,
        clpd=sum(score.policy_chosen_logp - score.policy_rejected_logp for score in scores) / number,
        is_right=tuple(score.margin > 0 for score in scores),
    )
