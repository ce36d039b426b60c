"""Measure what KV pruning costs in log-prob and answers on a model, for `mace profile pruning`."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.config import ModelConfig
from core.errors import AdapterError, ProfileError
from engine.pruning.gate import FractionResult, RecallBaseline, RecallResult, estimate
from engine.pruning.reader import Prefilled, PrunedReader, TokenPassage
from engine.pruning.tasks import Recall, RecallKind, is_right


@dataclass(slots=True)
class PruningMeasurement:
    """Measured values by context; `results` makes estimates of them. Fraction 0 is always measured."""

    fractions: tuple[float, ...]
    nats: dict[float, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Mean negative log-prob of a continuation's tokens, one value a passage."""
    right: dict[tuple[RecallKind, float], list[float]] = field(default_factory=lambda: defaultdict(list))
    """Share of right answers, one value a context."""
    guesses: dict[RecallKind, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Share of right answers that guessing would give, one value a question."""
    blocks: dict[float, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """Blocks dropped and full blocks, by context."""
    context_tokens: list[int] = field(default_factory=list)
    num_skipped: int = 0
    """Passages too short to drop anything at the largest fraction."""

    @property
    def baseline_nats_per_token(self) -> float:
        """Mean negative log-prob of the continuations, unpruned; ProfileError if no passage was long enough."""
        if not self.nats[0.0]:
            raise ProfileError("every passage is too short to drop a block: longer --context-tokens or texts")
        return statistics.fmean(self.nats[0.0])

    def baselines(self) -> dict[RecallKind, RecallBaseline]:
        """Answers without pruning, by kind of question."""
        return {
            kind: RecallBaseline(
                num_questions=len(guesses),
                accuracy=statistics.fmean(self.right[kind, 0.0]),
                guess_accuracy=statistics.fmean(guesses),
            )
            for kind, guesses in self.guesses.items()
        }

    def results(self) -> tuple[FractionResult, ...]:
        """Estimates for every fraction of what it costs against fraction 0; ProfileError with fewer than two values."""
        return tuple(self._result(fraction) for fraction in self.fractions)

    def _result(self, fraction: float) -> FractionResult:
        tasks: dict[RecallKind, RecallResult] = {}
        for kind in self.guesses:
            before, after = self.right[kind, 0.0], self.right[kind, fraction]
            drop = estimate([b - a for b, a in zip(before, after, strict=True)])
            tasks[kind] = RecallResult(accuracy=statistics.fmean(after), drop=drop)
        before, after = self.nats[0.0], self.nats[fraction]
        return FractionResult(
            fraction=fraction,
            logprob_drop=estimate([a - b for b, a in zip(before, after, strict=True)]),
            tasks=tasks,
            dropped_blocks=statistics.fmean(dropped for dropped, _ in self.blocks[fraction]),
            total_blocks=statistics.fmean(full for _, full in self.blocks[fraction]),
        )

    def _count_blocks(self, context: Prefilled) -> None:
        self.context_tokens.append(context.num_tokens)
        for fraction in self.fractions:
            self.blocks[fraction].append((len(context.dropped(fraction)), context.num_full_blocks))

    def add_passage(self, reader: PrunedReader, passage: TokenPassage) -> None:
        """Read on behind the passage's context at every fraction; too short a passage is skipped."""
        context_ids, continuation = passage
        context = reader.prefill(context_ids) if len(continuation) > 1 else None
        if context is None or not context.dropped(self.fractions[-1]):
            self.num_skipped += 1
            return
        self._count_blocks(context)
        for fraction in self.fractions:
            logprobs = reader.logprobs(context, fraction, continuation)
            self.nats[fraction].append(-float(logprobs.mean()))

    def add_recall(self, reader: PrunedReader, recall: Recall) -> None:
        """Answer the questions about a context at every fraction; they are asked after pruning."""
        context_ids, questions = reader.recall_ids(recall)
        context = reader.prefill(context_ids)
        self._count_blocks(context)
        self.guesses[recall.kind].extend(1 / question.num_candidates for question in recall.questions)
        for fraction in self.fractions:
            replies = reader.replies(context, fraction, questions)
            right = [is_right(reply, asked.answer) for reply, asked in zip(replies, recall.questions, strict=True)]
            self.right[recall.kind, fraction].append(statistics.fmean(right))


def measure(
    reader: PrunedReader,
    passages: Iterable[TokenPassage],
    recalls: Iterable[Recall],
    fractions: Iterable[float],
    on_context: Callable[[], None] = lambda: None,
) -> PruningMeasurement:
    """Read passages and answer questions at every fraction of pruning; `on_context` is called after each context."""
    out = PruningMeasurement(tuple(sorted({0.0, *fractions})))
    for passage in passages:
        out.add_passage(reader, passage)
        on_context()
    for recall in recalls:
        out.add_recall(reader, recall)
        on_context()
    return out


@contextmanager
def loaded_model(model_dir: Path, config: ModelConfig, adapter: Path | None, num_threads: int) -> Iterator[Any]:
    """Load a model for reading and its tokenizer, on the GPU if there is one; torch's thread count is restored.

    Raises:
        AdapterError: the adapter cannot be loaded onto this model.
        ProfileError: the model cannot be loaded.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        try:
            model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=config.dtype)
            tokenizer = AutoTokenizer.from_pretrained(model_dir)
        except (OSError, ValueError, RuntimeError) as error:
            raise ProfileError(f"cannot load {model_dir}: {error}") from error
        try:
            if adapter is not None:
                model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise AdapterError(f"cannot load adapter {adapter}: {error}") from error
        yield model.to(device).eval(), tokenizer
    finally:
        torch.set_num_threads(threads_before)
