"""Traffic around a publish, and what is read from it. `benchmarks.studies.publish_cost` runs it on an engine."""

import math
import random
import statistics
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from core.alignment_config import VersionsConfig
from deployments.publishing.prefix_warmer import PublishTiming

Mode = Literal["none", "cold", "warm"]
MODES: tuple[Mode, ...] = ("none", "cold", "warm")
"""No publish; one that leaves the cache of the new version empty; one that warms it first."""


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
class Arrival:
    """One request of the traffic."""

    due_s: float
    """Since the run began."""
    system: int
    to_base: bool
    prompt_ids: list[int]


@dataclass(slots=True)
class Served:
    """What became of a request."""

    arrival: Arrival
    version: str | None
    """Name of its adapter; None: the base."""
    sent_s: float
    """Since the run began, as `due_s`."""
    first_token_s: float
    cached_tokens: int

    @property
    def ttft_s(self) -> float:
        """From when it was due, however late it was sent."""
        return self.first_token_s - self.arrival.due_s


@dataclass(slots=True)
class Run:
    """One run of the traffic in one mode. Times are since it began."""

    mode: Mode
    options: CostOptions
    served: list[Served] = field(default_factory=list)
    publish_began_s: float = 0.0
    publish_ended_s: float = 0.0
    timing: PublishTiming = field(default_factory=PublishTiming)

    @property
    def first(self) -> list[Served]:
        """The first requests of the live name after the publish, or in its place."""
        after = (s for s in self.served if not s.arrival.to_base and s.sent_s >= self.publish_ended_s)
        return sorted(after, key=lambda served: served.sent_s)[: self.options.after]

    @property
    def openers(self) -> list[Served]:
        """Of those, the first one with each system prompt."""
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
        half_s = self.publish_began_s / 2
        return [s for s in asked if half_s <= s.sent_s < self.publish_began_s]


def draw_arrivals(options: CostOptions, vocab_size: int, seed: int) -> list[Arrival]:
    """The traffic of a seed. System prompts are the same for all seeds."""
    texts, traffic = random.Random(0), random.Random(seed)

    def tokens(rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    systems = [tokens(texts, options.system_tokens) for _ in range(options.num_systems)]
    popularity = [1.0 / rank for rank in range(1, options.num_systems + 1)]
    num_while_published = options.rate_per_s * (options.warm_timeout_s + 1.0)
    num_after = 1.5 * options.after / (1.0 - options.base_share)
    arrivals, due_s = [], 0.0
    for _ in range(options.before + math.ceil(num_while_published + num_after)):
        due_s += traffic.expovariate(options.rate_per_s)
        system = traffic.choices(range(options.num_systems), popularity)[0]
        prompt = [*systems[system], *tokens(traffic, options.question_tokens)]
        arrivals.append(Arrival(due_s, system, traffic.random() < options.base_share, prompt))
    return arrivals


def summarize(runs: list[Run]) -> dict[str, Any]:
    """The numbers of one mode: requests of all runs pooled, tokens and publish times as medians over runs."""
    timings = [run.timing for run in runs]
    first = [served for run in runs for served in run.first]
    return {
        "mode": runs[0].mode,
        "runs": len(runs),
        "requests": len(first),
        "computed_tokens": statistics.median(sum(map(computed_tokens, run.first)) for run in runs),
        "computed_tokens_by_run": [sum(map(computed_tokens, run.first)) for run in runs],
        "ttft_ms": _quantiles_ms(first),
        "ttft_of_openers_ms": _quantiles_ms([served for run in runs for served in run.openers]),
        "ttft_during_publish_ms": _quantiles_ms([served for run in runs for served in run.during]),
        "base_hit_share_before": _hit_share([s for run in runs for s in run.base(after=False)]),
        "base_hit_share_after": _hit_share([s for run in runs for s in run.base(after=True)]),
        "publish_ms": _median_ms([run.publish_ended_s - run.publish_began_s for run in runs]),
        "load_ms": _median_ms([timing.load_s for timing in timings]),
        "warm_ms": _median_ms([timing.warm_s for timing in timings]),
        "move_ms": _median_ms([timing.move_s for timing in timings]),
        "warmed_tokens": statistics.median(timing.warmed_tokens for timing in timings),
        "warm_errors": [timing.warm_error for timing in timings if timing.warm_error],
    }


def computed_tokens(served: Served) -> int:
    """Prompt tokens that the cache did not have."""
    return len(served.arrival.prompt_ids) - served.cached_tokens


def _quantiles_ms(requests: list[Served]) -> dict[str, float | int] | None:
    """None if there was no request."""
    if not requests:
        return None
    p50, p99 = np.percentile([served.ttft_s for served in requests], [50, 99])
    return {"requests": len(requests), "p50": round(1e3 * float(p50), 1), "p99": round(1e3 * float(p99), 1)}


def _hit_share(requests: list[Served]) -> float | None:
    """Of all prompt tokens, those that the cache had; None if there was no request."""
    total = sum(len(served.arrival.prompt_ids) for served in requests)
    return round(sum(served.cached_tokens for served in requests) / total, 4) if total else None


def _median_ms(values_s: list[float]) -> float:
    return round(1e3 * statistics.median(values_s), 2)
