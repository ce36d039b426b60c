"""One copy of the base weights or two: what sharing costs and saves on this machine.

    python -m benchmarks.studies.weights --json          the built-in model and a 0.5B-shaped one with random weights

Each configuration starts a real engine, in the order own, shared, own, shared, so that drift of a noisy machine
falls on both. Times are medians; memory is the worker process's.
"""

import asyncio
import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.harness.models import TITLES, ModelName, args_for, model_directories
from core.config import AppArgs
from core.types import FineTuneTask, TaskKind, TokenizedPair
from engine.vllm.compat import configure_environment
from engine.vllm.engine import HybridEngine

_DECODE_TOKENS = 48
_STEPS = 4
_PAIR_TOKENS = 64
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"


def main(
    as_json: Annotated[
        bool, typer.Option("--json", help="No progress bar; the result is JSON either way")
    ] = False,
    state_dir: Annotated[Path, typer.Option(help="Where the built-in model is or will be")] = Path("state"),
    repeats: Annotated[int, typer.Option(min=1, help="Times that each configuration is measured")] = 2,
    small_only: Annotated[bool, typer.Option(help="Only the built-in model")] = False,
) -> None:
    """Measure decode, prefill and a DPO step with and without sharing."""
    names: list[ModelName] = ["tiny"] if small_only else ["tiny", "half-b"]
    with model_directories(names, state_dir, show_progress=not as_json) as directories:
        rows = [row for name in names for row in _measure_model(name, directories[name], repeats)]
    typer.echo(json.dumps(rows, indent=2))


def _measure_model(name: ModelName, path: Path, repeats: int) -> Iterator[dict[str, Any]]:
    runs: dict[str, list[dict[str, float]]] = {"never": [], "always": []}
    for _ in range(repeats):
        for setting, results in runs.items():
            with _own_thread_binding():
                results.append(asyncio.run(_measure(name, path, setting)))
            typer.echo(f"{TITLES[name]}: share_base_weights={setting} {results[-1]}", err=True)
    for setting, results in runs.items():
        medians = {key: round(statistics.median(run[key] for run in results), 3) for key in results[0]}
        yield {"model": TITLES[name], "share_base_weights": setting, **medians}


@contextlib.contextmanager
def _own_thread_binding() -> Iterator[None]:
    """Undo the default that one model sets in the environment: the next one needs another number of threads."""
    given = os.environ.get(_BINDING)
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(_BINDING, None)


async def _measure(name: ModelName, path: Path, setting: str) -> dict[str, float]:
    args = AppArgs.model_validate(
        {
            "engine": {
                "share_base_weights": setting,
                "kv_cache_memory_bytes": 512 << 20,
                "max_num_seqs": 32,
            },
            "model": {"max_model_len": 2048},
        }
    )
    args = args_for(name, path, args)
    configure_environment(args, path)
    engine = await HybridEngine.start(args, str(path))
    try:
        await _decode(engine, 1, "warm-up")
        results = {
            "decode_1_ms": 1e3 * await _decode(engine, 1, "one"),
            "decode_32_ms": 1e3 * await _decode(engine, 32, "many"),
            "prefill_1024_ms": 1e3 * await _prefill(engine),
            "dpo_step_ms": 1e3 * await _train(engine),
            "worker_mib": _worker_bytes() / 2**20,
        }
    finally:
        engine.shutdown()
    return results


async def _decode(engine: HybridEngine, batch: int, name: str) -> float:
    """Median seconds between tokens of `batch` requests that run together."""

    async def one(number: int) -> list[float]:
        times = [time.perf_counter() async for _ in engine.decode(range(8), f"{name}-{number}", _DECODE_TOKENS)]
        return [after - before for before, after in itertools.pairwise(times)]

    gaps = await asyncio.gather(*map(one, range(batch)))
    return statistics.median(gap for row in gaps for gap in row)


async def _prefill(engine: HybridEngine) -> float:
    """Median seconds to the first token of a prompt of 1024 tokens that no cache knows."""
    times = []
    for number in range(5):
        started_s = time.perf_counter()
        prompt = [(number * 131 + i * 7) % 500 for i in range(1024)]
        _ = [ids async for ids in engine.decode(prompt, f"prefill-{number}", 1)]
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


async def _train(engine: HybridEngine) -> float:
    """Median device seconds of one DPO step on one pair of 2 x 64 tokens."""
    half = _PAIR_TOKENS // 2
    pair = TokenizedPair("p", tuple(range(half)), tuple(range(half)), tuple(range(1, half + 1)))
    results = [await engine.run_task(FineTuneTask(f"t{i}", TaskKind.TRAIN, (pair,))) for i in range(_STEPS)]
    return statistics.median(result.busy_s for result in results[1:])


def _worker_bytes() -> int:
    """Resident memory of this process's vLLM worker."""
    sizes = [0]
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # a zombie of the engine before
            if "Worker" in " ".join(child.cmdline()):
                sizes.append(child.memory_info().rss)
    return max(sizes)


if __name__ == "__main__":
    typer.run(main)
