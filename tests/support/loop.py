"""The alignment loop without serving: say, score with the live adapter, judge, train, publish. All parts are real."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.quality.monitor import QualityMonitor
from alignment.store.feedback_store import FeedbackStore
from alignment.store.pairs import StoredPair
from core.config import AppArgs
from core.types import FineTuneTask, PairScore, TaskKind, TokenizedPair
from core.wire import CachedReference, TrainingPair
from engine.tiny.knowledge import Question, Style, render
from engine.training.pair_tokens import PairTokenizer
from tests.support.in_process_engine import InProcessEngine

SCORED_AT_ONCE = 32
RESCORED = 64
"""Newest pairs that are scored again when another version is live."""
REPLAYED = 512
"""Newest pairs that a batch is drawn from."""
_REFERENCE_KEY = "one model, one tokenizer"


@dataclass(frozen=True)
class LoopReport:
    """Held-out scores of every version, the base first."""

    accuracies: list[float]
    margins: list[float]
    steps: int
    trained_pairs: int


def preference(question: Question, liked: Style, disliked: Style, **fields: Any) -> dict[str, Any]:
    """Body of a preference between two right answers of different styles."""
    return {
        "prompt": [{"role": "user", "content": question.text}],
        "chosen": render(question, liked),
        "rejected": render(question, disliked),
        **fields,
    }


def flipped(item: dict[str, Any]) -> dict[str, Any]:
    """The same preference the other way round."""
    return {**item, "chosen": item["rejected"], "rejected": item["chosen"]}


class Loop:
    """One server's learning, step by step under the test's control. `run_round` is one turn of it."""

    def __init__(self, args: AppArgs, model_dir: Path, test_items: Sequence[dict[str, Any]]) -> None:
        self.store = FeedbackStore.open(args.feedback, args.state_dir)
        self.monitor = QualityMonitor(args.quality, self.store)
        self._args = args
        self._engine = InProcessEngine(model_dir, args)
        self._tokenizer = PairTokenizer.load(str(model_dir), args.training)
        self._version: str | None = None
        self._num_tasks = 0
        self._num_versions = 0
        self._steps = 0
        self._trained_pairs = 0
        self._test_pairs = [
            TrainingPair(f"test-{number}", item["prompt"], item["chosen"], item["rejected"])
            for number, item in enumerate(test_items)
        ]
        self._tests: list[tuple[float, float]] = []

    def close(self) -> None:
        self.store.close()

    @property
    def report(self) -> LoopReport:
        accuracies, margins = ([test[part] for test in self._tests] for part in (0, 1))
        return LoopReport(accuracies, margins, self._steps, self._trained_pairs)

    async def test(self) -> None:
        """Score the live adapter on the test items, which are nobody's feedback."""
        scores = await self._evaluate(self._test_pairs)
        self._test_pairs = [
            replace(
                pair,
                reference=CachedReference(_REFERENCE_KEY, one.reference_chosen_logp, one.reference_rejected_logp),
            )
            for pair, one in zip(self._test_pairs, scores, strict=True)
        ]
        margins = [score.margin for score in scores]
        self._tests.append((sum(margin > 0 for margin in margins) / len(margins), sum(margins) / len(margins)))

    async def run_round(self, items: Sequence[dict[str, Any]], steps: int) -> None:
        """Take feedback in, judge it, train on it and publish what came of it."""
        outcomes = self.store.feedback.add(items)
        assert all(outcome.status == "accepted" for outcome in outcomes), outcomes
        while pairs := self.store.sampling.unscored_pairs(SCORED_AT_ONCE):
            await self._score(pairs)
        for _ in range(steps):
            await self._train()
        await self._publish()
        await self.test()
        while pairs := self.store.sampling.stale_pairs(SCORED_AT_ONCE, self._version, newest=RESCORED):
            await self._score(pairs)

    async def _score(self, pairs: list[StoredPair]) -> None:
        scores = await self._evaluate([_training_pair(pair) for pair in pairs])
        keys = {pair.pair_id: _REFERENCE_KEY for pair in pairs}
        self.store.pairs.record_scores(scores, self._version, keys)
        self.monitor.assess(self.store.pairs.find([pair.pair_id for pair in pairs]))

    async def _evaluate(self, pairs: Sequence[TrainingPair]) -> tuple[PairScore, ...]:
        return (await self._run(TaskKind.EVALUATE, pairs)).scores

    async def _train(self) -> None:
        """Half new pairs, half a sample of those trained before: by position, so that a run can be repeated."""
        size, epochs = self._args.training.pairs_per_step, self._args.training.max_epochs
        known = [
            pair
            for pair in self.store.sampling.newest_scored(REPLAYED)
            if pair.quality > 0 and pair.split == "train"
        ]
        new = [pair for pair in known if pair.times_trained == 0]
        old = [pair for pair in known if 0 < pair.times_trained < epochs]
        num_old = min(len(old), max(size // 2, size - len(new)))
        batch = new[: size - num_old] + random.Random(self._num_tasks).sample(old, num_old)
        if batch:
            await self._run(TaskKind.TRAIN, [_training_pair(pair) for pair in batch])
            self.store.pairs.mark_trained([pair.pair_id for pair in batch])
            self._steps += 1
            self._trained_pairs += len(batch)

    async def _publish(self) -> None:
        self._num_versions += 1
        self._version = f"v{self._num_versions:04d}"
        directory = self._args.state_dir / "adapters" / self._version
        await self._engine.save_adapter(directory, "tiny")
        await self._engine.set_live(directory)

    async def _run(self, kind: TaskKind, pairs: Sequence[TrainingPair]) -> Any:
        self._num_tasks += 1
        tokenized = tuple(map(self._tokenized, pairs))
        task = FineTuneTask(f"task-{self._num_tasks}", kind, tokenized, on_live=kind is TaskKind.EVALUATE)
        result = await self._engine.run_task(task)
        assert result.error is None, result.error
        return result

    def _tokenized(self, pair: TrainingPair) -> TokenizedPair:
        known = pair.reference
        reference = (known.chosen_logp, known.rejected_logp) if known is not None else None
        return replace(self._tokenizer.tokenize(pair), reference=reference)


def _training_pair(pair: StoredPair) -> TrainingPair:
    return TrainingPair(
        pair.pair_id,
        pair.prompt,
        pair.chosen,
        pair.rejected,
        pair.last_loss,
        weight=pair.weight * pair.quality,
        reference=pair.reference,
    )
