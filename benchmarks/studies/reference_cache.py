"""What cached reference log-probabilities save of a training step.

    python -m benchmarks.studies.reference_cache --json          the built-in model and a 0.5B-shaped one with
    random weights

The engine's own step, slice by slice, without vLLM. Each repeat runs the step with and without cached references,
one right after the other and in turns first, so that a noisy machine slows both; the ratio is the median of theirs.
"""

import json
import os
import random
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.models import TITLES, ModelName, model_directories, vocab_size
from core.config import LoraConfig, TrainingConfig
from core.types import FineTuneTask, SliceKind, TaskKind, TokenizedPair

_PAIRS: dict[ModelName, int] = {"tiny": 8, "half-b": 1}
_PROMPT_TOKENS = 64
_COMPLETION_TOKENS = 64
_REFERENCE = (SliceKind.REFERENCE_LAYER, SliceKind.REFERENCE_HEAD)
_FORWARD = (SliceKind.EMBED, *_REFERENCE, SliceKind.POLICY_LAYER, SliceKind.POLICY_HEAD)

_Seconds = dict[SliceKind, list[float]]
"""Times of a step's slices by kind."""


def main(
    as_json: Annotated[
        bool, typer.Option("--json", help="No progress bar; the result is JSON either way")
    ] = False,
    state_dir: Annotated[Path, typer.Option(help="Where the built-in model is or will be")] = Path("state"),
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each kind")] = 7,
    threads: Annotated[int, typer.Option(min=0, help="Torch threads; 0: every core of this process")] = 0,
    small_only: Annotated[bool, typer.Option(help="Only the built-in model")] = False,
) -> None:
    """Measure training steps with and without cached references."""
    import torch

    num_threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads)
    names: list[ModelName] = ["tiny"] if small_only else ["tiny", "half-b"]
    with model_directories(names, state_dir, show_progress=not as_json) as directories:
        rows = [_measure(name, directories[name], repeats) for name in names]
    typer.echo(json.dumps({"threads": num_threads, "repeats": repeats, "models": rows}, indent=2))


def _measure(name: ModelName, model_dir: Path, repeats: int) -> dict[str, Any]:
    import torch

    from engine.training.shadow import ShadowAdapter
    from engine.training.trainable import TrainableModel

    config = TrainingConfig()
    dtype = torch.float32 if name == "tiny" else torch.bfloat16  # as the engine serves them
    model = TrainableModel.build(str(model_dir), LoraConfig(), dtype=dtype, device=torch.device("cpu"), seed=0)
    shadow = ShadowAdapter(model, config)
    task = _make_task(_PAIRS[name], vocab_size(model_dir))
    scores = _run(model, shadow, replace(task, kind=TaskKind.EVALUATE), config)[1]
    cached = replace(
        task,
        pairs=tuple(
            replace(pair, reference=(score.reference_chosen_logp, score.reference_rejected_logp))
            for pair, score in zip(task.pairs, scores, strict=True)
        ),
    )
    runs: dict[bool, list[_Seconds]] = {False: [], True: []}
    for number in range(repeats + 1):
        for is_cached in (number % 2 == 0, number % 2 == 1):
            seconds, _ = _run(model, shadow, cached if is_cached else task, config)
            if number:  # the first one warms up
                runs[is_cached].append(seconds)
        typer.echo(f"{TITLES[name]}: {number} of {repeats}", err=True)
    row = {"model": TITLES[name], "pairs": len(task.pairs), **_summary(runs)}
    typer.echo(json.dumps(row), err=True)  # the next model may take long
    return row


def _make_task(num_pairs: int, num_words: int) -> FineTuneTask:
    rng = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(num_words) for _ in range(count))

    pairs = tuple(
        TokenizedPair(str(i), tokens(_PROMPT_TOKENS), tokens(_COMPLETION_TOKENS), tokens(_COMPLETION_TOKENS))
        for i in range(num_pairs)
    )
    return FineTuneTask("measured", TaskKind.TRAIN, pairs)


def _run(model: Any, shadow: Any, task: FineTuneTask, config: TrainingConfig) -> tuple[_Seconds, Any]:
    """Times of the slices of one step from a fresh adapter, and the scores."""
    from engine.training.dpo import DpoStep

    shadow.reset()
    step = DpoStep(model, shadow, task, config)
    seconds: _Seconds = defaultdict(list)
    while step.next_slice is not None:
        started_s = time.perf_counter()
        kind = step.run_slice()
        seconds[kind].append(time.perf_counter() - started_s)
    return seconds, step.result()[1]


def _summary(runs: dict[bool, list[_Seconds]]) -> dict[str, Any]:
    """Medians over repeats. Shares are of the uncached step: by number of slices, and by time."""
    totals = {is_cached: [sum(map(sum, run.values())) for run in steps] for is_cached, steps in runs.items()}
    ratios = [cached / plain for plain, cached in zip(totals[False], totals[True], strict=True)]
    counts = {kind: len(slices) for kind, slices in runs[False][0].items()}
    cached_counts = {kind: len(slices) for kind, slices in runs[True][0].items()}
    forward = sum(counts[kind] for kind in _FORWARD)
    # Backward computes each layer's forward pass once more; its own share of a backward slice is not counted.
    layers = sum(counts[kind] for kind in (SliceKind.REFERENCE_LAYER, SliceKind.POLICY_LAYER))
    return {
        "step_ms": round(1e3 * statistics.median(totals[False]), 1),
        "cached_step_ms": round(1e3 * statistics.median(totals[True]), 1),
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_low": round(min(ratios), 3),
        "time_ratio_high": round(max(ratios), 3),
        "slices": sum(counts.values()),
        "cached_slices": sum(cached_counts.values()),
        "forward_slices_saved": round(1 - sum(cached_counts.get(kind, 0) for kind in _FORWARD) / forward, 3),
        "layer_forwards_saved": round(
            counts[SliceKind.REFERENCE_LAYER] / (layers + counts[SliceKind.BACKWARD_LAYER]), 3
        ),
        "forward_time_saved": round(statistics.median(map(_reference_share, runs[False])), 3),
        "longest_slice_ms": round(1e3 * max(max(map(max, run.values())) for run in runs[False]), 1),
        "optimizer_slice_ms": round(1e3 * statistics.median(run[SliceKind.OPTIMIZER][0] for run in runs[True]), 1),
    }


def _reference_share(run: _Seconds) -> float:
    """Of the forward slices' time; half of the embedding is the reference's."""
    embed_s = sum(run[SliceKind.EMBED])
    reference_s = sum(sum(run[kind]) for kind in _REFERENCE) + embed_s / 2
    return reference_s / sum(sum(run[kind]) for kind in _FORWARD)


if __name__ == "__main__":
    typer.run(main)
