"""Cost of a publish for the requests that come right after it, with and without warming the next version's cache.

    mace bench publish --json          --model long --system-tokens 1024 for longer prompts

One real engine for all runs. A run is open-loop traffic: Poisson arrivals, each a system prompt (popularity by
Zipf's law) and a question of its own, some to the base model, the others to the live version. In its middle a
version is published, `warm` or `cold`, or none is (`none`). Looked at are the first requests of the new version, and
the base's. The adapter is untrained: what it computes costs the same.
Runs with the same seed follow each other in turn, from an empty prefix cache; the first round is not counted.
"""

import asyncio
import json
import math
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer
from pydantic import BaseModel, ConfigDict

from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.registry import AdapterRegistry, AdapterVersion
from benchmarks.harness.client import Clock, Load, Request, RequestRecord
from benchmarks.harness.jobs import MeasurementError
from benchmarks.harness.models import TITLES, ModelName, args_for, model_directories, start_engine
from benchmarks.harness.report import AsJson, Out, StateDir, note, show
from core.alignment_config import VersionsConfig
from core.config import AppArgs
from deployments.publishing.prefix_warmer import PublishTiming

if TYPE_CHECKING:
    from deployments.publishing.versions import AdapterVersions
    from engine.vllm.engine import HybridEngine

Mode = Literal["none", "cold", "warm"]
MODES: tuple[Mode, ...] = ("none", "cold", "warm")
"""No publish; one that leaves the cache of the new version empty; one that warms it first."""

_MODEL_ID = "measured"
_BASE_MODEL = "measured-base"
_DRAIN_S = 600.0


class CostOptions(BaseModel):
    """The traffic, and how often it is run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate_per_s: float = 8.0
    num_systems: int = 6
    system_tokens: int = 512
    question_tokens: int = 24
    answer_tokens: int = 8
    base_share: float = 0.25
    before: int = 48
    """Requests that arrive before the publish begins."""
    after: int = 24
    """Requests of the new version that are looked at."""
    block_tokens: int = 32
    warm_timeout_s: float = VersionsConfig().warm_timeout_s
    repeats: int = 5


@dataclass(frozen=True, slots=True)
class Arrival(Request):
    """One request of the traffic."""

    system: int = 0
    """Number of the system prompt that it begins with."""
    to_base: bool = False


@dataclass(slots=True)
class Served:
    """One request and its fate."""

    arrival: Arrival
    record: RequestRecord
    cached_tokens: int = 0

    @property
    def sent_s(self) -> float:
        """Time of sending, since the run began."""
        return self.record.sent_s or 0.0

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the cache did not have."""
        return len(self.arrival.prompt) - self.cached_tokens


@dataclass(slots=True)
class Run:
    """One run of the traffic in one mode. Times are since it began."""

    mode: Mode
    options: CostOptions
    served: list[Served] = field(default_factory=list)
    """In order of sending."""
    publish_began_s: float = 0.0
    publish_ended_s: float = 0.0
    timing: PublishTiming = field(default_factory=PublishTiming)

    @property
    def first(self) -> list[Served]:
        """The first requests of the live name after the publish, or in its place."""
        after = [s for s in self.served if not s.arrival.to_base and s.sent_s >= self.publish_ended_s]
        return after[: self.options.after]

    @property
    def openers(self) -> list[Served]:
        """The first one of `first` with each system prompt."""
        seen: dict[int, Served] = {}
        for served in self.first:
            seen.setdefault(served.arrival.system, served)
        return list(seen.values())

    @property
    def during(self) -> list[Served]:
        """Requests that were sent while the version was being brought in."""
        return [s for s in self.served if self.publish_began_s <= s.sent_s < self.publish_ended_s]

    def base(self, *, after: bool) -> list[Served]:
        """The base's requests before the publish, or after it."""
        asked = [s for s in self.served if s.arrival.to_base]
        if after:
            return [s for s in asked if s.sent_s >= self.publish_ended_s]
        # What the empty cache of the beginning cost is not the question.
        return [s for s in asked if self.publish_began_s / 2 <= s.sent_s < self.publish_began_s]


def main(
    as_json: AsJson = False,
    model: Annotated[ModelName, typer.Option(help="Which model")] = "tiny",
    state_dir: StateDir = Path("state"),
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each mode, in turn")] = 5,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests/s")] = 8.0,
    systems: Annotated[int, typer.Option(min=1, help="System prompts")] = 6,
    system_tokens: Annotated[int, typer.Option(min=32, help="Their length")] = 512,
    warm_timeout: Annotated[float, typer.Option(min=0.01, help="versions.warm_timeout_s")] = 2.0,
    out: Out = None,
) -> None:
    """Measure what a publish costs the first requests after it; prints JSON."""
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
    show({"model": TITLES[model], "options": options.model_dump(), "modes": rows}, (), True, out)


async def _measure(name: ModelName, model_dir: Path, options: CostOptions) -> list[Run]:
    engine_section = {
        "kv_cache_memory_bytes": 512 << 20,
        "max_num_seqs": 32,
        "engine_kwargs": {"block_size": options.block_tokens},
    }
    sections = {"engine": engine_section, "model": {"max_model_len": options.system_tokens + 512}}
    engine = await start_engine(args_for(name, model_dir, AppArgs.model_validate(sections)), model_dir)
    runs = []
    try:
        with tempfile.TemporaryDirectory(prefix="mace-publish-") as directory:
            traffic = _Traffic(engine, AdapterRegistry.open(Path(directory), _BASE_MODEL), options)
            await traffic.attach()
            for repeat in range(options.repeats + 1):
                turn = repeat % len(MODES)
                for mode in [*MODES[turn:], *MODES[:turn]]:
                    run = await traffic.run(mode, repeat)
                    note(f"{repeat} {json.dumps(summarize([run]))}")
                    if repeat:
                        runs.append(run)
    finally:
        engine.shutdown()
    return runs


class _Traffic:
    """Runs on one engine. Two images of the versions, as two executors would have: one warms, the other does not."""

    def __init__(self, engine: "HybridEngine", registry: AdapterRegistry, options: CostOptions) -> None:
        from deployments.publishing.versions import AdapterVersions

        self._engine = engine
        self._registry = registry
        self._options = options
        warm = VersionsConfig(warm_prefixes=2 * options.num_systems, warm_timeout_s=options.warm_timeout_s)
        self._warming = AdapterVersions(engine, registry, _MODEL_ID, warm)
        self._plain = AdapterVersions(engine, registry, _MODEL_ID, VersionsConfig(warm_prefixes=0))

    async def attach(self) -> None:
        """Bring in the first version."""
        for versions in (self._warming, self._plain):
            await versions.attach({})
        await self._plain.publish(await self._new_version())

    async def run(self, mode: Mode, seed: int) -> Run:
        """Send the traffic of a seed, with a publish in its middle.

        Raises:
            MeasurementError: the prefix cache cannot be emptied, or a request failed.
        """
        for one in (self._warming, self._plain):
            await one.refresh()
        versions = self._warming if mode == "warm" else self._plain
        following = await self._new_version()
        if not await self._engine.client.reset_prefix_cache():
            raise MeasurementError("the prefix cache cannot be emptied: requests are left")
        run = Run(mode, self._options)
        arrivals = draw_arrivals(self._options, self._engine.vocab_size, seed)
        clock = Clock()
        load = Load(_VersionPort(self._engine, versions, run.served, f"cost-{mode}-{seed}"), clock)

        async def publish() -> None:
            run.publish_began_s = clock()
            if mode != "none":
                await versions.publish(following)
                run.timing = replace(versions.last_publish)
            run.publish_ended_s = clock()

        await load.open_loop(arrivals[: self._options.before])
        publishing = asyncio.create_task(publish())
        await load.open_loop(arrivals[self._options.before :])
        await publishing
        await load.drain(_DRAIN_S)
        if errors := [record.error for record in load.records if record.error]:
            raise MeasurementError(f"{len(errors)} requests failed: {errors[0]}")
        return run

    async def _new_version(self) -> AdapterVersion:
        """A version of the untrained adapter: it answers like the base, under a name and with keys of its own."""
        staging = self._registry.begin()
        await self._engine.save_adapter(staging, _BASE_MODEL)
        manifest = AdapterManifest(base_model=_BASE_MODEL, status="published", reason="measured")
        return self._registry.commit(staging, manifest)


@dataclass(frozen=True, slots=True)
class _VersionPort:
    """Requests to the version that is live when they are sent, or to the base. An output counts as one token."""

    engine: "HybridEngine"
    versions: "AdapterVersions"
    served: list[Served]
    """Filled with the requests, and what the prefix cache held of each."""
    run_id: str

    async def stream(self, request: Request, record: RequestRecord) -> AsyncIterator[int]:
        """See `benchmarks.harness.client.Port`."""
        from engine.vllm.compat import make_sampling_params

        assert isinstance(request, Arrival)
        self.served.append(served := Served(request, record))
        outputs = self.engine.client.generate(
            {"prompt_token_ids": request.prompt},
            make_sampling_params(request.max_tokens),
            f"{self.run_id}-{request.request_id}",
            lora_request=None if request.to_base else self.versions.live_handle,
        )
        async for output in outputs:
            served.cached_tokens = output.num_cached_tokens
            yield 1


def draw_arrivals(options: CostOptions, vocab_size: int, seed: int) -> list[Arrival]:
    """Draw the traffic of a seed. System prompts are the same for all seeds."""
    texts, traffic = random.Random(0), random.Random(seed)

    def tokens(rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    systems = [tokens(texts, options.system_tokens) for _ in range(options.num_systems)]
    popularity = [1.0 / rank for rank in range(1, options.num_systems + 1)]
    num_while_published = options.rate_per_s * (options.warm_timeout_s + 1.0)
    num_after = 1.5 * options.after / (1.0 - options.base_share)
    arrivals, due_s = [], 0.0
    for number in range(options.before + math.ceil(num_while_published + num_after)):
        due_s += traffic.expovariate(options.rate_per_s)
        system = traffic.choices(range(options.num_systems), popularity)[0]
        prompt = [*systems[system], *tokens(traffic, options.question_tokens)]
        to_base = traffic.random() < options.base_share
        arrivals.append(Arrival(str(number), prompt, due_s, options.answer_tokens, system=system, to_base=to_base))
    return arrivals


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """The numbers of one mode: requests of all runs pooled, tokens and publish times as medians over runs."""
    timings = [run.timing for run in runs]
    first = [served for run in runs for served in run.first]
    computed = [sum(served.computed_tokens for served in run.first) for run in runs]
    return {
        "mode": runs[0].mode,
        "runs": len(runs),
        "requests": len(first),
        "computed_tokens": statistics.median(computed),
        "computed_tokens_by_run": computed,
        "ttft_ms": _quantiles_ms(first),
        "ttft_of_openers_ms": _quantiles_ms([served for run in runs for served in run.openers]),
        "ttft_during_publish_ms": _quantiles_ms([served for run in runs for served in run.during]),
        "base_hit_share_before": _hit_share([served for run in runs for served in run.base(after=False)]),
        "base_hit_share_after": _hit_share([served for run in runs for served in run.base(after=True)]),
        "publish_ms": _median_ms(run.publish_ended_s - run.publish_began_s for run in runs),
        "load_ms": _median_ms(timing.load_s for timing in timings),
        "warm_ms": _median_ms(timing.warm_s for timing in timings),
        "move_ms": _median_ms(timing.move_s for timing in timings if timing.move_s is not None),
        "warmed_tokens": statistics.median(timing.warmed_tokens for timing in timings),
        "warm_errors": [timing.warm_error for timing in timings if timing.warm_error],
    }


def _quantiles_ms(requests: list[Served]) -> dict[str, float | int] | None:
    """TTFT from when a request was due, however late it was sent; None if there was no request."""
    if not requests:
        return None
    ttfts_ms = [1e3 * (served.record.ttft_s or 0.0) for served in requests]
    quantiles = {f"p{place}": round(float(np.percentile(ttfts_ms, place)), 1) for place in (50, 99)}
    return {"requests": len(requests), **quantiles}


def _hit_share(requests: list[Served]) -> float | None:
    """Share of all prompt tokens that the cache had; None if there was no request."""
    total = sum(len(served.arrival.prompt) for served in requests)
    return round(sum(served.cached_tokens for served in requests) / total, 4) if total else None


def _median_ms(values_s: Iterable[float]) -> float | None:
    """None for no values."""
    values_s = list(values_s)
    return round(1e3 * statistics.median(values_s), 2) if values_s else None
