"""What a publish costs the requests that come right after it, with and without warming the next version's cache.

    python -m benchmarks.studies.publish_cost --json          --model long --system-tokens 1024 for longer prompts

One real engine for all runs. A run is open-loop traffic: Poisson arrivals, each a system prompt (popularity by
Zipf's law) and a question of its own, some to the base model, the others to the live version. In its middle a
version is published, `warm` or `cold`, or none is (`none`). Looked at are the first requests of the new version, and
the base's. The adapter is untrained: what it computes costs the same.
Runs with the same seed follow each other in turn, from an empty prefix cache; the first round is not counted.
"""

import asyncio
import itertools
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.registry import AdapterRegistry, AdapterVersion
from benchmarks.harness.jobs import MeasurementError
from benchmarks.harness.models import TITLES, ModelName, args_for, model_directories
from benchmarks.studies.publish_traffic import (
    MODES,
    Arrival,
    CostOptions,
    Mode,
    Run,
    Served,
    draw_arrivals,
    summarize,
)
from core.alignment_config import VersionsConfig
from core.config import AppArgs
from deployments.publishing.versions import AdapterVersions
from engine.vllm.compat import configure_environment, make_sampling_params
from engine.vllm.engine import HybridEngine

_MODEL_ID = "measured"
_BASE_MODEL = "measured-base"


def main(
    as_json: Annotated[
        bool, typer.Option("--json", help="No progress bar; the result is JSON either way")
    ] = False,
    model: Annotated[ModelName, typer.Option(help="Which model")] = "tiny",
    state_dir: Annotated[Path, typer.Option(help="Where the built-in model is or will be")] = Path("state"),
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each mode, in turn")] = 5,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests/s")] = 8.0,
    systems: Annotated[int, typer.Option(min=1, help="System prompts")] = 6,
    system_tokens: Annotated[int, typer.Option(min=32, help="Their length")] = 512,
    warm_timeout: Annotated[float, typer.Option(min=0.01, help="versions.warm_timeout_s")] = 2.0,
) -> None:
    """Measure the first requests after a publish."""
    options = CostOptions(
        rate_per_s=rate,
        num_systems=systems,
        system_tokens=system_tokens,
        warm_timeout_s=warm_timeout,
        repeats=repeats,
    )
    with model_directories([model], state_dir, show_progress=not as_json) as directories:
        runs = asyncio.run(_measure(model, directories[model], options))
    rows = [summarize([run for run in runs if run.mode == mode]) for mode in MODES]
    typer.echo(json.dumps({"model": TITLES[model], "options": options.model_dump(), "modes": rows}, indent=2))


async def _measure(name: ModelName, model_dir: Path, options: CostOptions) -> list[Run]:
    args = args_for(name, model_dir, _app_args(options))
    configure_environment(args, model_dir)
    engine = await HybridEngine.start(args, str(model_dir))
    try:
        with tempfile.TemporaryDirectory(prefix="mace-publish-") as directory:
            registry = AdapterRegistry.open(Path(directory), _BASE_MODEL)
            traffic = _Traffic(engine, registry, options)
            await traffic.attach()
            runs = []
            for repeat in range(options.repeats + 1):
                turn = repeat % len(MODES)
                for mode in [*MODES[turn:], *MODES[:turn]]:
                    run = await traffic.run(mode, repeat)
                    typer.echo(f"{repeat} {json.dumps(summarize([run]))}", err=True)
                    runs += [run] if repeat else []
            return runs
    finally:
        engine.shutdown()


def _app_args(options: CostOptions) -> AppArgs:
    return AppArgs.model_validate(
        {
            "engine": {
                "kv_cache_memory_bytes": 512 << 20,
                "max_num_seqs": 32,
                "engine_kwargs": {"block_size": options.block_tokens},
            },
            "model": {"max_model_len": options.system_tokens + 512},
        }
    )


class _Traffic:
    """Runs on one engine. Two images of the versions, as two executors would have: one warms, the other does not."""

    def __init__(self, engine: HybridEngine, registry: AdapterRegistry, options: CostOptions) -> None:
        self._engine = engine
        self._registry = registry
        self._options = options
        cold = VersionsConfig(warm_prefixes=0)
        warm = VersionsConfig(warm_prefixes=2 * options.num_systems, warm_timeout_s=options.warm_timeout_s)
        self._warming = AdapterVersions(engine, registry, _MODEL_ID, warm)
        self._plain = AdapterVersions(engine, registry, _MODEL_ID, cold)
        self._numbers = itertools.count()

    async def attach(self) -> None:
        for versions in (self._warming, self._plain):
            await versions.attach({})
        await self._plain.publish(await self._new_version())

    async def run(self, mode: Mode, seed: int) -> Run:
        """The traffic of a seed, with a publish in its middle.

        Raises:
            MeasurementError: the prefix cache cannot be emptied.
        """
        for one in (self._warming, self._plain):
            await one.refresh()
        versions = self._warming if mode == "warm" else self._plain
        following = await self._new_version()
        if not await self._engine.client.reset_prefix_cache():
            raise MeasurementError("the prefix cache cannot be emptied: requests are left")
        run = Run(mode, self._options)
        arrivals = draw_arrivals(self._options, self._engine.vocab_size, seed)
        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, arrival in enumerate(arrivals):
                await asyncio.sleep(max(0.0, started_s + arrival.due_s - time.perf_counter()))
                group.create_task(self._ask(run, versions, arrival, started_s))
                if number + 1 == self._options.before:
                    group.create_task(self._publish(run, versions, following, started_s))
        return run

    async def _publish(
        self, run: Run, versions: AdapterVersions, following: AdapterVersion, started_s: float
    ) -> None:
        run.publish_began_s = time.perf_counter() - started_s
        run.publish_ended_s = math.inf  # nothing is after it yet
        if run.mode != "none":
            await versions.publish(following)
            run.timing = replace(versions.last_publish)
        run.publish_ended_s = time.perf_counter() - started_s

    async def _ask(self, run: Run, versions: AdapterVersions, arrival: Arrival, started_s: float) -> None:
        handle = None if arrival.to_base else versions.live_handle
        name = handle.lora_name if handle is not None else None
        sent_s = time.perf_counter() - started_s
        outputs = self._engine.client.generate(
            {"prompt_token_ids": arrival.prompt_ids},
            make_sampling_params(self._options.answer_tokens),
            f"cost-{next(self._numbers)}",
            lora_request=handle,
        )
        times_s, cached_tokens = [], 0
        async for output in outputs:
            times_s.append(time.perf_counter() - started_s)
            cached_tokens = output.num_cached_tokens
        run.served.append(Served(arrival, name, sent_s, times_s[0], cached_tokens))

    async def _new_version(self) -> AdapterVersion:
        """A version of the untrained adapter: it answers like the base, under a name and with keys of its own."""
        staging = self._registry.begin()
        await self._engine.save_adapter(staging, _BASE_MODEL)
        manifest = AdapterManifest(base_model=_BASE_MODEL, status="published", reason="measured")
        return self._registry.commit(staging, manifest)


if __name__ == "__main__":
    typer.run(main)
