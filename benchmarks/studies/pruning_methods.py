"""Which KV blocks to drop: the scores that MACE uses against chance and against age, on a model that looks things up.

    python -m benchmarks.studies.pruning_methods --state-dir state --json

The same contexts, passages and questions for every method and block size (`benchmarks.studies.needle_model` reads
them).
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

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
                typer.echo(f"{method}, blocks of {size}: done", err=True)
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
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
    state_dir: Annotated[Path, typer.Option(help="Where the model is or will be")] = Path("state"),
    samples: Annotated[int, typer.Option(min=2, help="Passages, and contexts of each task")] = 32,
    context_tokens: Annotated[int, typer.Option(min=256, help="Length of a context")] = 768,
    blocks: Annotated[str, typer.Option(help="Block sizes in tokens")] = "16,32,128",
    seed: Annotated[int, typer.Option(help="Of texts, questions and random scores")] = 1,
) -> None:
    """Compare methods of KV pruning on the needle model."""
    from benchmarks.studies.needle_model import ensure_needle_model

    started_s = time.monotonic()
    model_dir = ensure_needle_model(state_dir, on_progress=_note)
    sizes = [int(part) for part in blocks.split(",")]
    compared = compare(model_dir, sizes, samples, context_tokens, seed)
    document = {
        "command": " ".join(sys.argv),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "device": describe_device(1),
        "versions": software_versions(),
        "model": model_dir.name,
        "elapsed_s": round(time.monotonic() - started_s, 1),
        **compared,
    }
    if as_json:
        typer.echo(json.dumps(document, indent=1))
    else:
        _show(document)


def _note(step: int, loss: float, accuracy: float) -> None:
    typer.echo(f"step {step}: loss {loss:.3f}, {accuracy:.0%} right", err=True)


def _show(document: dict[str, Any]) -> None:
    unpruned = ", ".join(f"{kind} {task['accuracy']:.0%}" for kind, task in document["baseline"].items())
    table = Table("blocks of", "method", "dropped", "log-prob drop", *_KINDS, title=f"unpruned: {unpruned}")
    for row in document["rows"]:
        drop = row["logprob_drop"]
        answers = [f"{row['tasks'][kind]['accuracy']:.0%}" for kind in _KINDS]
        spread = f"{drop['mean']:+.3f} [{drop['low']:+.3f}, {drop['high']:+.3f}]"
        table.add_row(str(row["block_tokens"]), row["method"], f"{row['fraction']:.0%}", spread, *answers)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
