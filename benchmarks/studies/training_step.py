"""Savings of cached references and shared prompts in a training step. `mace bench reference-cache`, `prompt-sharing`.

The engine's own step, slice by slice, without vLLM. Each repeat runs both kinds of step, one right after the other and
in turns first, so that a noisy machine slows both; a ratio is the median over repeats. All models have random weights
but the built-in one of `reference-cache`.

`prompt-sharing` counts the seconds of this process on one core: the time of an idle machine. Its larger model has 2 of
24 layers and a twelfth of the words, so that layers and head share the work as in the whole model. Rows are prompt and
completion; `even` pairs all have the same lengths, the worst case for sharing, `uneven` ones differ by up to 40 % in
prompt and completions, so that the plain layout pads.
"""

import gc
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.harness.models import TITLES, ModelName, model_directories, random_model, vocab_size
from benchmarks.harness.report import AsJson, Column, Out, StateDir, note, show, table_of
from core.config import LoraConfig, TrainingConfig
from core.types import FineTuneTask, SliceKind, TaskKind, TokenizedPair

if TYPE_CHECKING:
    from engine.training.shadow import ShadowAdapter
    from engine.training.trainable import TrainableModel

_CACHE_PAIRS: dict[ModelName, int] = {"tiny": 8, "half-b": 1}
_CACHE_PROMPT_TOKENS = 64
_CACHE_ROW_TOKENS = 128
_REFERENCE = (SliceKind.REFERENCE_LAYER, SliceKind.REFERENCE_HEAD)
_FORWARD = (SliceKind.EMBED, *_REFERENCE, SliceKind.POLICY_LAYER, SliceKind.POLICY_HEAD)

SHARES = (0, 15, 30, 45, 60, 75, 90)
"""Prompt in per cent of a row."""
_UNEVEN = 0.4


@dataclass(frozen=True, slots=True)
class SharingModel:
    """A random model and the steps that are measured on it."""

    title: str
    num_pairs: int
    dtype: str
    """The type in which the engine serves it on a CPU."""
    settings: tuple[tuple[int, str, bool], ...]
    """Tokens of a row, lengths, and whether the reference is cached."""


SHARING_MODELS = {
    "tiny": SharingModel(
        "built-in shape, random",
        4,
        "float32",
        (
            (128, "even", False),
            (128, "even", True),
            (128, "uneven", False),
            (256, "even", False),
            (256, "even", True),
        ),
    ),
    "half-b": SharingModel(
        "0.5B shape, 2 of 24 layers, 1/12 of the words, random",
        2,
        "bfloat16",
        ((128, "even", False), (128, "even", True), (256, "even", False)),
    ),
}


@dataclass(slots=True)
class StepRun:
    """One step from a fresh adapter."""

    seconds: dict[SliceKind, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Wall times of its slices by kind."""
    cpu_s: float = 0.0
    """CPU time of the process, building of the step's tensors included."""
    peak_bytes: int = 0
    """Most that was held between slices."""
    layer_tokens: int = 0
    """Tokens that go through each layer, padding included."""
    scores: Any = None

    @property
    def total_s(self) -> float:
        """Wall time of all slices."""
        return sum(map(sum, self.seconds.values()))


def run_step(
    model: "TrainableModel", shadow: "ShadowAdapter", task: FineTuneTask, *, share_prompt: bool = True
) -> StepRun:
    """Run a step slice by slice."""
    from engine.training.dpo import DpoStep

    shadow.reset()
    gc.collect()
    run, began_s = StepRun(), time.process_time()
    step = DpoStep(model, shadow, task, TrainingConfig(), share_prompt=share_prompt)
    layers = [spec for spec in step.pending if spec.kind is SliceKind.BACKWARD_LAYER]
    while step.next_slice is not None:
        started_s = time.perf_counter()
        kind = step.run_slice()
        run.seconds[kind].append(time.perf_counter() - started_s)
        run.peak_bytes = max(run.peak_bytes, step.activation_bytes)
    run.cpu_s = time.process_time() - began_s
    run.layer_tokens = sum(spec.num_tokens for spec in layers) // model.num_layers
    run.scores = step.result()[1]
    return run


def with_references(task: FineTuneTask, evaluated: StepRun) -> FineTuneTask:
    """The task with the reference log-probabilities that a step found."""
    known = [(score.reference_chosen_logp, score.reference_rejected_logp) for score in evaluated.scores]
    pairs = [replace(pair, reference=values) for pair, values in zip(task.pairs, known, strict=True)]
    return replace(task, pairs=tuple(pairs))


def in_turns(repeats: int, run: Callable[[bool], StepRun]) -> dict[bool, list[StepRun]]:
    """Runs without and with what is measured, side by side; the first of each warms up and is not kept."""
    runs: dict[bool, list[StepRun]] = {False: [], True: []}
    for number in range(repeats + 1):
        for is_on in (number % 2 == 0, number % 2 == 1):
            one = run(is_on)
            if number:
                runs[is_on].append(one)
    return runs


def random_task(
    num_pairs: int, row_tokens: int, prompt_tokens: int, spread: float, num_words: int, seed: int
) -> FineTuneTask:
    """A task of random pairs whose rows are that long on average; `spread` is the relative deviation of lengths."""
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        length = max(1, round(count * rng.uniform(1 - spread, 1 + spread)))
        return tuple(rng.randrange(num_words) for _ in range(length if count else 0))

    rest = row_tokens - prompt_tokens
    pairs = tuple(
        TokenizedPair(str(i), tokens(prompt_tokens), tokens(rest), tokens(rest)) for i in range(num_pairs)
    )
    return FineTuneTask("measured", TaskKind.TRAIN, pairs)


def _trainable(directory: Path, dtype_name: str) -> "tuple[TrainableModel, ShadowAdapter]":
    import torch

    from engine.training.shadow import ShadowAdapter
    from engine.training.trainable import TrainableModel

    dtype = getattr(torch, dtype_name)
    model = TrainableModel.build(str(directory), LoraConfig(), dtype=dtype, device=torch.device("cpu"), seed=0)
    return model, ShadowAdapter(model, TrainingConfig())


def reference_cache(
    as_json: AsJson = False,
    state_dir: StateDir = Path("state"),
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each kind")] = 7,
    threads: Annotated[int, typer.Option(min=0, help="Torch threads; 0: every core of this process")] = 0,
    small_only: Annotated[bool, typer.Option(help="Only the built-in model")] = False,
    out: Out = None,
) -> None:
    """A training step with and without cached reference log-probabilities, as JSON."""
    import torch

    num_threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads)
    names: list[ModelName] = ["tiny"] if small_only else ["tiny", "half-b"]
    rows = []
    with model_directories(names, state_dir, show_progress=not as_json) as directories:
        for name in names:
            model, shadow = _trainable(directories[name], SHARING_MODELS[name].dtype)
            num_pairs, words = _CACHE_PAIRS[name], vocab_size(directories[name])
            task = random_task(num_pairs, _CACHE_ROW_TOKENS, _CACHE_PROMPT_TOKENS, 0.0, words, 0)
            rows.append({"model": TITLES[name], "pairs": num_pairs, **_save(model, shadow, task, repeats)})
            note(f"{rows[-1]}")  # the next model may take long
    show({"threads": num_threads, "repeats": repeats, "models": rows}, (), True, out)


def _save(model: "TrainableModel", shadow: "ShadowAdapter", task: FineTuneTask, repeats: int) -> dict[str, Any]:
    """Medians over repeats. Shares are of the uncached step: by number of slices, and by time."""
    cached = with_references(task, run_step(model, shadow, replace(task, kind=TaskKind.EVALUATE)))
    runs = in_turns(repeats, lambda is_cached: run_step(model, shadow, cached if is_cached else task))
    pairs = list(zip(runs[False], runs[True], strict=True))
    ratios = [cached.total_s / plain.total_s for plain, cached in pairs]
    plain, cached_counts = ({kind: len(times) for kind, times in run.seconds.items()} for run in pairs[0])
    forward = sum(plain[kind] for kind in _FORWARD)
    # Backward computes each layer's forward pass once more; its own share of a backward slice is not counted.
    layers = sum(
        plain[kind] for kind in (SliceKind.REFERENCE_LAYER, SliceKind.POLICY_LAYER, SliceKind.BACKWARD_LAYER)
    )
    optimizer_s = statistics.median(run.seconds[SliceKind.OPTIMIZER][0] for run in runs[True])
    return {
        "step_ms": round(1e3 * statistics.median(run.total_s for run in runs[False]), 1),
        "cached_step_ms": round(1e3 * statistics.median(run.total_s for run in runs[True]), 1),
        **_spread("time_ratio", ratios),
        "slices": sum(plain.values()),
        "cached_slices": sum(cached_counts.values()),
        "forward_slices_saved": round(1 - sum(cached_counts.get(kind, 0) for kind in _FORWARD) / forward, 3),
        "layer_forwards_saved": round(plain[SliceKind.REFERENCE_LAYER] / layers, 3),
        "forward_time_saved": round(statistics.median(map(_reference_share, runs[False])), 3),
        "longest_slice_ms": round(1e3 * max(max(map(max, run.seconds.values())) for run in runs[False]), 1),
        "optimizer_slice_ms": round(1e3 * optimizer_s, 1),
    }


def _spread(name: str, ratios: list[float]) -> dict[str, float]:
    found = {name: statistics.median(ratios), f"{name}_low": min(ratios), f"{name}_high": max(ratios)}
    return {key: round(value, 3) for key, value in found.items()}


def _reference_share(run: StepRun) -> float:
    """Share of the forward slices' time; half of the embedding is the reference's."""
    embed_s = sum(run.seconds[SliceKind.EMBED])
    reference_s = sum(sum(run.seconds[kind]) for kind in _REFERENCE) + embed_s / 2
    return reference_s / sum(sum(run.seconds[kind]) for kind in _FORWARD)


_SHARING_COLUMNS: tuple[Column, ...] = (
    ("model", "model", str),
    ("row, tokens", "row_tokens", str),
    ("lengths", "lengths", str),
    ("reference", "is_cached", lambda is_cached: "cached" if is_cached else "computed"),
    ("prompt, %", "prompt_percent", str),
    ("pairs/s", "pairs_per_s", str),
    ("without", "pairs_per_s_off", str),
    ("ratio", "ratio", str),
    ("low", "ratio_low", str),
    ("high", "ratio_high", str),
    ("layer tokens", "layer_tokens", str),
    ("without", "layer_tokens_off", str),
    ("peak, MiB", "peak_mib", str),
    ("without", "peak_mib_off", str),
)
"""Sharing on against off at one point; pairs per second of one core. A ratio above 1 favours sharing."""


def prompt_sharing(
    as_json: AsJson = False,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each kind and point")] = 3,
    only: Annotated[str | None, typer.Option(help="tiny or half-b")] = None,
    out: Out = None,
) -> None:
    """A training step that computes a pair's prompt once, against one that computes it twice."""
    import torch

    if only is not None and only not in SHARING_MODELS:
        known = ", ".join(SHARING_MODELS)
        raise typer.BadParameter(f"there is no model {only}; known: {known}", param_hint="--only")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in [only] if only else SHARING_MODELS:
        for row in _measure_sharing(name, repeats):
            note(f"{row}")  # the whole takes many minutes
            rows.append(row)
    report = {"threads": 1, "repeats": repeats, "rows": rows}
    show(report, [table_of("Shared prompts", rows, _SHARING_COLUMNS)], as_json, out)


def _run_sharing(model: "TrainableModel", shadow: "ShadowAdapter", task: FineTuneTask, shares: bool) -> StepRun:
    return run_step(model, shadow, task, share_prompt=shares)


def _measure_sharing(name: str, repeats: int) -> Iterator[dict[str, Any]]:
    described = SHARING_MODELS[name]
    with tempfile.TemporaryDirectory(prefix="mace-bench-") as scratch:
        directory = random_model(Path(scratch), f"{name}-part")
        num_words = vocab_size(directory)
        model, shadow = _trainable(directory, described.dtype)
    for (row_tokens, lengths, is_cached), percent in product(described.settings, SHARES):
        spread = _UNEVEN if lengths == "uneven" else 0.0
        prompt_tokens = round(row_tokens * percent / 100)
        seed = row_tokens + percent
        task = random_task(described.num_pairs, row_tokens, prompt_tokens, spread, num_words, seed)
        if is_cached:
            evaluated = run_step(model, shadow, replace(task, kind=TaskKind.EVALUATE))
            task = with_references(task, evaluated)
        runs = in_turns(repeats, partial(_run_sharing, model, shadow, task))
        ratios = [off.cpu_s / on.cpu_s for off, on in zip(runs[False], runs[True], strict=True)]
        off, on = (len(task.pairs) / statistics.median(run.cpu_s for run in runs[key]) for key in (False, True))
        shared, plain = runs[True][0], runs[False][0]
        yield {
            "model": described.title,
            "row_tokens": row_tokens,
            "lengths": lengths,
            "is_cached": is_cached,
            "prompt_percent": percent,
            "pairs_per_s": round(on, 2),
            "pairs_per_s_off": round(off, 2),
            **_spread("ratio", ratios),
            "layer_tokens": shared.layer_tokens,
            "layer_tokens_off": plain.layer_tokens,
            "peak_mib": round(shared.peak_bytes / 2**20, 2),
            "peak_mib_off": round(plain.peak_bytes / 2**20, 2),
        }
