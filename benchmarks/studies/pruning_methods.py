"""Compare MACE's scores of KV blocks with chance and with age, on a model that looks things up.

    mace bench pruning-methods --state-dir state --json

The same contexts, passages and questions for every method and block size (`benchmarks.studies.needle_model` reads
them).
"""

import random
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.harness.report import AsJson, Column, Out, StateDir, interval_of, note, show, table_of
from benchmarks.studies.needle_model import ensure_needle_model
from core.config import KV_PRUNING_SINK_TOKENS, KvPruningConfig, ModelConfig
from engine.pruning.tasks import RecallKind, make_recall
from profiler.device import describe_device, git_commit, software_versions

if TYPE_CHECKING:
    from torch import Tensor

    from engine.pruning.accuracy import PruningMeasurement
    from engine.pruning.scores import ScoreBlocks

METHODS = ("keydiff", "random", "oldest")
FRACTIONS = (0.1, 0.25, 0.5)
_KINDS: tuple[RecallKind, ...] = ("needle", "qa")
_QUESTIONS = 4
_CONTINUATION_TOKENS = 96


def method_scores(method: str, seed: int) -> "ScoreBlocks":
    """The rule that scores blocks by one of `METHODS`: KeyDiff, chance, or age (a sliding window behind the sinks)."""
    import torch

    from engine.pruning.scores import score_blocks

    generator = torch.Generator().manual_seed(seed)

    def random_scores(stats: "Tensor", num_tokens: int) -> "Tensor":  # noqa: ARG001
        return torch.rand(stats.shape[1], generator=generator)

    def oldest_first(stats: "Tensor", num_tokens: int) -> "Tensor":  # noqa: ARG001
        return torch.arange(stats.shape[1], dtype=torch.float32)

    return {"keydiff": score_blocks, "random": random_scores, "oldest": oldest_first}[method]


def compare(
    model_dir: Path, block_sizes: Sequence[int], samples: int, context_tokens: int, seed: int
) -> dict[str, Any]:
    """One row for each method, block size and fraction, and the unpruned model's answers."""
    from engine.pruning.accuracy import loaded_model, measure
    from engine.pruning.passages import generated_passages
    from engine.pruning.reader import PrunedReader, PruningPlan

    kept = KvPruningConfig()
    rows: list[dict[str, Any]] = []
    with loaded_model(model_dir, ModelConfig(), None, 1) as (model, tokenizer):
        for size in block_sizes:
            for method in METHODS:
                plan = PruningPlan(size, kept.recent_tokens, score=method_scores(method, seed))
                reader = PrunedReader(model, tokenizer, plan)
                rng = random.Random(seed)
                passages = list(generated_passages(reader, samples, context_tokens, _CONTINUATION_TOKENS, rng))
                recalls = [
                    make_recall(kind, context_tokens, _QUESTIONS, reader.count_tokens, rng)
                    for kind in _KINDS
                    for _ in range(samples)
                ]
                measured = measure(reader, passages, recalls, FRACTIONS)
                rows += _rows(measured, method, size)
                note(f"{method}, blocks of {size}: done")
    baseline = {kind: task.model_dump() for kind, task in measured.baselines().items()}
    return {
        "context_tokens": statistics.fmean(measured.context_tokens),
        "sink_tokens": KV_PRUNING_SINK_TOKENS,
        "recent_tokens": kept.recent_tokens,
        "baseline": baseline,
        "baseline_nats_per_token": measured.baseline_nats_per_token,
        "rows": rows,
    }


def _rows(measured: "PruningMeasurement", method: str, block_tokens: int) -> list[dict[str, Any]]:
    return [
        {"method": method, "block_tokens": block_tokens, **result.model_dump(mode="json")}
        for result in measured.results()
        if result.fraction > 0
    ]


def main(
    as_json: AsJson = False,
    state_dir: StateDir = Path("state"),
    samples: Annotated[int, typer.Option(min=2, help="Passages, and contexts of each task")] = 32,
    context_tokens: Annotated[int, typer.Option(min=256, help="Length of a context")] = 768,
    blocks: Annotated[str, typer.Option(help="Block sizes in tokens")] = "16,32,128",
    seed: Annotated[int, typer.Option(help="Seed of texts, questions and random scores")] = 1,
    out: Out = None,
) -> None:
    """Compare MACE's scores of KV blocks with chance and age, on the needle model."""
    started_s = time.monotonic()
    model_dir = ensure_needle_model(state_dir)
    compared = compare(model_dir, [int(part) for part in blocks.split(",")], samples, context_tokens, seed)
    report = {
        "command": " ".join(sys.argv),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "device": describe_device(1),
        "versions": software_versions(),
        "model": model_dir.name,
        "elapsed_s": round(time.monotonic() - started_s, 1),
        **compared,
    }
    unpruned = ", ".join(f"{kind} {task['accuracy']:.0%}" for kind, task in report["baseline"].items())
    columns: tuple[Column, ...] = (
        ("blocks of", "block_tokens", str),
        ("method", "method", str),
        ("dropped", "fraction", "{:.0%}".format),
        ("log-prob drop", "logprob_drop", interval_of("mean", 3)),
        *((kind, kind, "{:.0%}".format) for kind in _KINDS),
    )
    rows = [{**row, **{kind: row["tasks"][kind]["accuracy"] for kind in _KINDS}} for row in report["rows"]]
    show(report, [table_of(f"unpruned: {unpruned}", rows, columns)], as_json, out)
