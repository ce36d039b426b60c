"""What KV pruning costs in log-prob and answers on a model: the measurement behind `mace profile pruning`."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.config import ModelConfig
from core.errors import AdapterError, ProfileError
from engine.pruning.gate import FractionResult, RecallResult, TaskBaseline, estimate
from engine.pruning.reader import PrunedReader, TokenPassage
from engine.pruning.tasks import Recall, RecallKind, is_right

Progress = Callable[[], None]
"""Called after each context."""


@dataclass(slots=True)
class BlockCounts:
    """Blocks dropped and in use, by context."""

    dropped: list[int] = field(default_factory=list)
    total: list[int] = field(default_factory=list)


@dataclass(slots=True)
class PruningMeasurement:
    """What came out, by context; `results` makes estimates of it. Fraction 0 is always measured."""

    fractions: tuple[float, ...]
    nats: dict[float, list[float]] = field(default_factory=dict)
    """Mean negative log-prob of a continuation's tokens, one value a passage."""
    right: dict[tuple[RecallKind, float], list[float]] = field(default_factory=dict)
    """Share of right answers, one value a context."""
    guesses: dict[RecallKind, list[float]] = field(default_factory=dict)
    """Share of right answers that guessing would give, one value a question."""
    blocks: dict[float, BlockCounts] = field(default_factory=dict)
    context_tokens: list[int] = field(default_factory=list)
    num_skipped: int = 0
    """Passages too short to drop anything at the largest fraction."""

    @property
    def mean_context_tokens(self) -> float:
        """Over all contexts."""
        return statistics.fmean(self.context_tokens)

    @property
    def baseline_nats_per_token(self) -> float:
        """Of the continuations, unpruned.

        Raises:
            ProfileError: no passage was long enough.
        """
        if not self.nats:
            raise ProfileError("every passage is too short to drop a block: longer --context-tokens or texts")
        return statistics.fmean(self.nats[0.0])

    def baselines(self) -> dict[RecallKind, TaskBaseline]:
        """The tasks without pruning."""
        return {
            kind: TaskBaseline(
                num_questions=len(guesses),
                accuracy=statistics.fmean(self.right[kind, 0.0]),
                guess_accuracy=statistics.fmean(guesses),
            )
            for kind, guesses in self.guesses.items()
        }

    def results(self) -> tuple[FractionResult, ...]:
        """Drops against fraction 0.

        Raises:
            ProfileError: there are fewer than two passages, or fewer than two contexts of a task.
        """
        return tuple(self._result(fraction) for fraction in self.fractions)

    def _result(self, fraction: float) -> FractionResult:
        tasks: dict[RecallKind, RecallResult] = {}
        for kind in self.guesses:
            before, after = self.right[kind, 0.0], self.right[kind, fraction]
            drop = estimate([b - a for b, a in zip(before, after, strict=True)])
            tasks[kind] = RecallResult(accuracy=statistics.fmean(after), drop=drop)
        before, after = self.nats.get(0.0, []), self.nats.get(fraction, [])
        return FractionResult(
            fraction=fraction,
            logprob_drop=estimate([a - b for b, a in zip(before, after, strict=True)]),
            tasks=tasks,
            dropped_blocks=statistics.fmean(self.blocks[fraction].dropped),
            total_blocks=statistics.fmean(self.blocks[fraction].total),
        )


def measure(
    reader: PrunedReader,
    passages: Iterable[TokenPassage],
    recalls: Iterable[Recall],
    fractions: Sequence[float],
    on_context: Progress | None = None,
) -> PruningMeasurement:
    """Read passages and answer questions at every fraction of pruning; questions are asked after pruning."""
    out = PruningMeasurement(tuple(sorted({0.0, *fractions})))
    for passage in passages:
        _read_passage(reader, passage, out)
        if on_context:
            on_context()
    for recall in recalls:
        _answer(reader, recall, out)
        if on_context:
            on_context()
    return out


def _read_passage(reader: PrunedReader, passage: TokenPassage, out: PruningMeasurement) -> None:
    context_ids, continuation = passage
    if len(continuation) < 2:
        out.num_skipped += 1
        return
    context = reader.prefill(context_ids)
    if not context.dropped(out.fractions[-1]):
        out.num_skipped += 1
        return
    out.context_tokens.append(context.num_tokens)
    for fraction in out.fractions:
        logprobs = reader.logprobs(context, fraction, continuation)
        out.nats.setdefault(fraction, []).append(-float(logprobs.mean()))
        _count(out, fraction, len(context.dropped(fraction)), context.num_full_blocks)


def _answer(reader: PrunedReader, recall: Recall, out: PruningMeasurement) -> None:
    context_ids, questions = reader.recall_ids(recall)
    context = reader.prefill(context_ids)
    out.context_tokens.append(context.num_tokens)
    out.guesses.setdefault(recall.kind, []).extend(1 / question.num_candidates for question in recall.questions)
    for fraction in out.fractions:
        replies = reader.replies(context, fraction, questions)
        right = [is_right(reply, asked.answer) for reply, asked in zip(replies, recall.questions, strict=True)]
        out.right.setdefault((recall.kind, fraction), []).append(statistics.fmean(right))
        _count(out, fraction, len(context.dropped(fraction)), context.num_full_blocks)


def _count(out: PruningMeasurement, fraction: float, dropped: int, total: int) -> None:
    blocks = out.blocks.setdefault(fraction, BlockCounts())
    blocks.dropped.append(dropped)
    blocks.total.append(total)


@contextmanager
def loaded_model(model_dir: Path, config: ModelConfig, adapter: Path | None, num_threads: int) -> Iterator[Any]:
    """A model for reading and its tokenizer, on the GPU if there is one. Restores torch's thread count.

    Raises:
        AdapterError: the adapter cannot be loaded onto this model.
        ProfileError: the model cannot be loaded.
    """
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
        if adapter is not None:
            model = _with_adapter(model, adapter)
        yield model.to(device).eval(), tokenizer
    finally:
        torch.set_num_threads(threads_before)


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(f"cannot load adapter {adapter}: {error}") from error
