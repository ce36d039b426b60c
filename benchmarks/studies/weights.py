"""One copy of the base weights or two: what sharing costs and saves on this machine. `mace bench weights`.

Each configuration starts a real engine, in the order own, shared, own, shared, so that drift of a noisy machine
falls on both. Times are medians; memory is the worker process's.
"""

import asyncio
import contextlib
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from benchmarks.harness.client import EnginePort, Load, Request, RequestRecord
from benchmarks.harness.models import TITLES, ModelName, args_for, model_directories
from benchmarks.harness.report import AsJson, Out, StateDir, note, show
from core.config import AppArgs
from core.types import FineTuneTask, TaskKind, TokenizedPair

if TYPE_CHECKING:
    from engine.vllm.engine import HybridEngine

_DECODE_TOKENS = 48
_STEPS = 4
_PAIR_TOKENS = 64
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"


def main(
    as_json: AsJson = False,
    state_dir: StateDir = Path("state"),
    repeats: Annotated[int, typer.Option(min=1, help="Times that each configuration is measured")] = 2,
    small_only: Annotated[bool, typer.Option(help="Only the built-in model")] = False,
    out: Out = None,
) -> None:
    """Decode, prefill and a DPO step with one copy of the base weights and with two, as JSON."""
    names: list[ModelName] = ["tiny"] if small_only else ["tiny", "half-b"]
    with model_directories(names, state_dir, show_progress=not as_json) as directories:
        rows = [row for name in names for row in _measure_model(name, directories[name], repeats)]
    show(rows, (), True, out)


def _measure_model(name: ModelName, path: Path, repeats: int) -> Iterator[dict[str, Any]]:
    runs: dict[str, list[dict[str, float]]] = {"never": [], "always": []}
    for _ in range(repeats):
        for setting, results in runs.items():
            with _own_thread_binding():
                results.append(asyncio.run(_measure(name, path, setting)))
            note(f"{TITLES[name]}: share_base_weights={setting} {results[-1]}")
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
    from engine.vllm.compat import configure_environment
    from engine.vllm.engine import HybridEngine

    engine_section = {"share_base_weights": setting, "kv_cache_memory_bytes": 512 << 20, "max_num_seqs": 32}
    sections = {"engine": engine_section, "model": {"max_model_len": 2048}}
    args = args_for(name, path, AppArgs.model_validate(sections))
    configure_environment(args, path)
    engine = await HybridEngine.start(args, str(path))
    try:
        await _decode(engine, 1, "warm-up")
        return {
            "decode_1_ms": 1e3 * await _decode(engine, 1, "one"),
            "decode_32_ms": 1e3 * await _decode(engine, 32, "many"),
            "prefill_1024_ms": 1e3 * await _prefill(engine),
            "dpo_step_ms": 1e3 * await _train(engine),
            "worker_mib": _worker_bytes() / 2**20,
        }
    finally:
        engine.shutdown()


async def _decode(engine: "HybridEngine", batch: int, name: str) -> float:
    """Median seconds between tokens of `batch` requests that run together."""
    requests = [Request(f"{name}-{i}", range(8), max_tokens=_DECODE_TOKENS) for i in range(batch)]
    records = await _ask(engine, requests, batch)
    return statistics.median(gap_s for record in records for gap_s in record.gaps_s)


async def _prefill(engine: "HybridEngine") -> float:
    """Median seconds to the first token of a prompt of 1024 tokens that no cache knows."""
    prompts = ([(number * 131 + i * 7) % 500 for i in range(1024)] for number in range(5))
    requests = [Request(f"prefill-{i}", prompt, max_tokens=1) for i, prompt in enumerate(prompts)]
    return statistics.median(record.ttft_s or 0.0 for record in await _ask(engine, requests, 1))


async def _ask(engine: "HybridEngine", requests: list[Request], num_workers: int) -> list[RequestRecord]:
    load = Load(EnginePort(engine))
    await load.closed_loop(iter(requests), num_workers)
    return load.records


async def _train(engine: "HybridEngine") -> float:
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
