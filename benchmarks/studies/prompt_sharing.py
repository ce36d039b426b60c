"""What it saves to compute a pair's prompt once in a training step.

    python -m benchmarks.studies.prompt_sharing --json       the built-in model's shape, and Qwen2.5-0.5B's with
    two layers

The engine's own step, slice by slice, without vLLM, with `experiments.share_prompt` on and off. Each repeat runs both,
one right after the other and in turns first, so that a noisy machine slows both; a ratio is the median over repeats.
Seconds are those of this process on one core: the time of an idle machine.

Both models have random weights. The larger one has 2 of 24 layers and a twelfth of the words, so that layers and head
share the work as in the whole model. Rows are prompt and completion; `even` pairs all have the same lengths, the worst
case for sharing, `uneven` ones differ by up to 40 % in prompt and completions, so that the plain layout pads.
"""

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Annotated, Any

import typer

from core.config import LoraConfig, TrainingConfig
from core.types import FineTuneTask, TaskKind, TokenizedPair

SHARES = (0, 15, 30, 45, 60, 75, 90)
"""Prompt in per cent of a row."""
_UNEVEN = 0.4


@dataclass(frozen=True, slots=True)
class Model:
    """A random model and the step that is measured on it."""

    title: str
    num_pairs: int
    dtype: str
    """As the engine serves it on a CPU."""


MODELS = {
    "tiny": Model("built-in shape, random", 4, "float32"),
    "half-b": Model("0.5B shape, 2 of 24 layers, 1/12 of the words, random", 2, "bfloat16"),
}


_SETTINGS: dict[str, list[tuple[int, str, bool]]] = {
    "tiny": [
        (128, "even", False),
        (128, "even", True),
        (128, "uneven", False),
        (256, "even", False),
        (256, "even", True),
    ],
    "half-b": [(128, "even", False), (128, "even", True), (256, "even", False)],
}
"""Tokens of a row, lengths, and whether the reference is cached."""


@dataclass(frozen=True, slots=True)
class Run:
    """One step."""

    cpu_s: float
    peak_bytes: int
    """Most that was held between slices."""
    layer_tokens: int
    """Tokens that go through each layer, padding included."""


@dataclass(frozen=True, slots=True)
class Row:
    """Sharing on against off at one point. A ratio above 1 favours sharing."""

    model: str
    row_tokens: int
    lengths: str
    is_cached: bool
    """The reference log-probabilities are known."""
    prompt_percent: int
    pairs_per_s: float
    """Per second of one core."""
    pairs_per_s_off: float
    ratio: float
    ratio_low: float
    ratio_high: float
    layer_tokens: int
    layer_tokens_off: int
    peak_mib: float
    peak_mib_off: float


def main(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each kind and point")] = 3,
    only: Annotated[str | None, typer.Option(help="tiny or half-b")] = None,
) -> None:
    """Measure training steps with and without shared prompts."""
    import torch

    if only is not None and only not in MODELS:
        raise typer.BadParameter(f"there is no model {only}; known: {', '.join(MODELS)}", param_hint="--only")
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in [only] if only else MODELS:
        rows += _measure_model(name, repeats)
    if as_json:
        typer.echo(json.dumps({"threads": 1, "repeats": repeats, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        typer.echo("\n".join(map(_line, rows)))


def _measure_model(name: str, repeats: int) -> Iterator[Row]:
    import torch

    from engine.training.shadow import ShadowAdapter
    from engine.training.trainable import TrainableModel

    dtype = getattr(torch, MODELS[name].dtype)
    with tempfile.TemporaryDirectory(prefix="mace-bench-") as scratch:
        num_words = _write_model(name, scratch)
        model = TrainableModel.build(scratch, LoraConfig(), dtype=dtype, device="cpu", seed=0)
    shadow = ShadowAdapter(model, TrainingConfig())
    for (row_tokens, lengths, is_cached), share in product(_SETTINGS[name], SHARES):
        spread = _UNEVEN if lengths == "uneven" else 0.0
        task = _make_task(MODELS[name].num_pairs, row_tokens, share, spread, num_words)
        if is_cached:
            task = _with_references(model, shadow, task)
        point = (MODELS[name].title, row_tokens, lengths, is_cached, share)
        row = Row(*point, **_compare(model, shadow, task, repeats))
        typer.echo(_line(row), err=True)  # the whole takes many minutes
        yield row


def _write_model(name: str, directory: str) -> int:
    """Write a random model; returns its number of words."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

    from engine.tiny.tokenizer import VOCAB_SIZE
    from engine.tiny.train import Recipe

    config: PreTrainedConfig
    if name == "tiny":
        recipe = Recipe()
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_kv_heads,
            tie_word_embeddings=True,
        )
    else:
        config = Qwen2Config(
            vocab_size=151_936 // 12,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=2,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return int(config.vocab_size)


def _make_task(num_pairs: int, row_tokens: int, share: int, spread: float, num_words: int) -> FineTuneTask:
    rng = random.Random(row_tokens + share)

    def tokens(count: int) -> tuple[int, ...]:
        length = max(1, round(count * rng.uniform(1 - spread, 1 + spread)))
        return tuple(rng.randrange(num_words) for _ in range(length if count else 0))

    num_prompt = round(row_tokens * share / 100)
    rest = row_tokens - num_prompt
    pairs = tuple(TokenizedPair(str(i), tokens(num_prompt), tokens(rest), tokens(rest)) for i in range(num_pairs))
    return FineTuneTask("measured", TaskKind.TRAIN, pairs)


def _with_references(model: Any, shadow: Any, task: FineTuneTask) -> FineTuneTask:
    from engine.training.dpo import DpoStep

    step = DpoStep(model, shadow, replace(task, kind=TaskKind.EVALUATE), TrainingConfig())
    while step.next_slice is not None:
        step.run_slice()
    known = [(score.reference_chosen_logp, score.reference_rejected_logp) for score in step.result()[1]]
    pairs = [replace(pair, reference=values) for pair, values in zip(task.pairs, known, strict=True)]
    return replace(task, pairs=tuple(pairs))


def _compare(model: Any, shadow: Any, task: FineTuneTask, repeats: int) -> dict[str, Any]:
    runs: dict[bool, list[Run]] = {False: [], True: []}
    for number in range(repeats + 1):
        for shares in (number % 2 == 0, number % 2 == 1):
            run = _run(model, shadow, task, share_prompt=shares)
            if number:  # the first one warms up
                runs[shares].append(run)
    ratios = [off.cpu_s / on.cpu_s for off, on in zip(runs[False], runs[True], strict=True)]
    speed = {key: len(task.pairs) / statistics.median(run.cpu_s for run in runs[key]) for key in runs}
    on, off = runs[True][0], runs[False][0]
    return {
        "pairs_per_s": round(speed[True], 2),
        "pairs_per_s_off": round(speed[False], 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "layer_tokens": on.layer_tokens,
        "layer_tokens_off": off.layer_tokens,
        "peak_mib": round(on.peak_bytes / 2**20, 2),
        "peak_mib_off": round(off.peak_bytes / 2**20, 2),
    }


def _run(model: Any, shadow: Any, task: FineTuneTask, *, share_prompt: bool) -> Run:
    """One step from a fresh adapter, building of its tensors included."""
    from core.types import SliceKind
    from engine.training.dpo import DpoStep

    shadow.reset()
    gc.collect()
    peak_bytes = 0
    started_s = time.process_time()
    step = DpoStep(model, shadow, task, TrainingConfig(), share_prompt=share_prompt)
    layers = [spec for spec in step.pending if spec.kind is SliceKind.BACKWARD_LAYER]
    while step.next_slice is not None:
        step.run_slice()
        peak_bytes = max(peak_bytes, step.activation_bytes)
    cpu_s = time.process_time() - started_s
    return Run(cpu_s, peak_bytes, sum(spec.num_tokens for spec in layers) // model.num_layers)


def _line(row: Row) -> str:
    reference = "cached" if row.is_cached else "computed"
    return (
        f"{row.model}, {row.row_tokens} {row.lengths}, reference {reference}, prompt {row.prompt_percent} %: "
        f"{row.pairs_per_s} pairs/s against {row.pairs_per_s_off}, ratio {row.ratio} "
        f"({row.ratio_low} to {row.ratio_high}), tokens {row.layer_tokens} / {row.layer_tokens_off}, "
        f"peak {row.peak_mib} / {row.peak_mib_off} MiB"
    )


if __name__ == "__main__":
    typer.run(main)
