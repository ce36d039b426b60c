"""Traces: requests and preference pairs over time, as YAML. The simulator and the benchmarks read the same files.

A trace holds distributions and a seed, not a list: the same file gives the same requests everywhere. Arrivals,
prompt lengths, output lengths and classes are drawn from separate streams: changing one leaves the others as they were.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from core.config import AppArgs
from core.errors import ConfigError
from scheduler.priority import BACKGROUND_PRIORITY
from simulator.power import Power

_BLOCK = 8192
"""Requests drawn at a time."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Constant(_Part):
    """Always the same length."""

    kind: Literal["constant"]
    value: int = Field(ge=1)

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:  # noqa: ARG002
        """`count` lengths in tokens."""
        return np.full(count, self.value, dtype=np.int64)


class _Bounded(_Part):
    low: int = Field(1, ge=1)
    high: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "_Bounded":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self


class Uniform(_Bounded):
    """Every length from `low` to `high`, both included."""

    kind: Literal["uniform"]

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths in tokens."""
        return rng.integers(self.low, self.high, size=count, endpoint=True)


class LogNormal(_Bounded):
    """Log-normal with this mean before the clip to `low` and `high`; `sigma` is of the logarithm."""

    kind: Literal["lognormal"]
    mean: float = Field(gt=0)
    sigma: float = Field(gt=0)

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths in tokens."""
        drawn = rng.lognormal(np.log(self.mean) - self.sigma**2 / 2, self.sigma, size=count)
        return np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)


Lengths = Annotated[Constant | Uniform | LogNormal, Field(discriminator="kind")]


class Burst(_Part):
    """A stretch of time in which requests arrive `factor` times as fast."""

    start_s: float = Field(ge=0)
    duration_s: float = Field(gt=0)
    factor: float = Field(gt=0)


class Arrivals(_Part):
    """When requests arrive. Bursts may overlap: their factors multiply."""

    process: Literal["poisson", "gamma", "constant"] = "poisson"
    rate_per_s: float = Field(gt=0)
    """Arrivals per second over the whole cluster."""
    cv: float | None = Field(None, gt=0)
    """Coefficient of variation of the gaps; only for `gamma` (1 is Poisson, above 1 is burstier)."""
    bursts: tuple[Burst, ...] = ()

    @model_validator(mode="after")
    def _cv_belongs_to_gamma(self) -> "Arrivals":
        if (self.process == "gamma") != (self.cv is not None):
            raise ValueError("arrivals.cv goes with process gamma, and process gamma needs it")
        return self

    def times(self, rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
        """Blocks of arrival times in seconds, growing, without end.

        Gaps of mean 1 are drawn on a clock that runs with the arrival rate, and mapped back through the integral of the
        rate: so bursts bend every process alike.
        """
        knots_s, operational = self._integrated_rate()
        last_rate = self.rate_per_s
        reached = 0.0
        while True:
            block = reached + np.cumsum(self._gaps(rng))
            reached = float(block[-1])
            times = np.interp(block, operational, knots_s)
            yield np.where(block > operational[-1], knots_s[-1] + (block - operational[-1]) / last_rate, times)

    def _gaps(self, rng: np.random.Generator) -> NDArray[np.float64]:
        if self.process == "constant":
            return np.ones(_BLOCK)
        if self.cv is None:
            return rng.exponential(size=_BLOCK)
        return rng.gamma(self.cv**-2, self.cv**2, size=_BLOCK)

    def _integrated_rate(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Times at which the rate changes, and the expected number of arrivals up to each."""
        edges = {0.0}.union(*({b.start_s, b.start_s + b.duration_s} for b in self.bursts))
        knots = np.array(sorted(edges))
        rates = np.full(max(len(knots) - 1, 0), self.rate_per_s)
        for burst in self.bursts:
            inside = (knots[:-1] >= burst.start_s) & (knots[:-1] < burst.start_s + burst.duration_s)
            rates[inside] *= burst.factor
        return knots, np.concatenate([[0.0], np.cumsum(rates * np.diff(knots))])


class FineTune(_Part):
    """The preference pairs that wait for training, and their lengths (all alike)."""

    pairs_per_s: float | None = Field(None, ge=0)
    """Pairs per second over the whole cluster, evenly spaced. None: a backlog that never empties. 0: none."""
    prompt_tokens: int = Field(24, ge=1)
    completion_tokens: int = Field(24, ge=1)


class SlowDown(_Part):
    """From `at_s` on, forward passes and slices take `factor` times as long as the profile says (simulator only)."""

    at_s: float = Field(ge=0)
    factor: float = Field(gt=0)
    over_s: float = Field(0.0, ge=0)
    """Seconds that the device takes to become so slow, as one does whose clock falls when it is hot. 0: at once."""


@dataclass(slots=True)
class TraceRequest:
    """One request of a trace."""

    request_id: str
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    user_priority: int = 0


class Trace(_Part):
    """The load of a run and the settings it runs with; exactly one of `duration_s` and `num_requests` ends it."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    duration_s: float | None = Field(None, gt=0)
    num_requests: int | None = Field(None, ge=1)
    arrivals: Arrivals
    prompt_tokens: Lengths
    output_tokens: Lengths
    background_share: float = Field(
        0.0, ge=0, le=1, validation_alias=AliasChoices("background_share", "batch_share")
    )
    """Share of requests of class `background`; the others are `interactive`. Older traces call it `batch_share`."""
    finetune: FineTune = FineTune()
    executors: int = Field(1, ge=1, le=1000)
    args: AppArgs = AppArgs()
    """Settings of the run: `slo`, `scheduler`, `training`, `engine`, as in `serve_config.yaml`."""
    profile: Path | None = None
    """Profile of the device; None: given on the command line."""
    slow_down: SlowDown | None = None
    power: Power | None = None
    """Watts of an executor's devices; None: joules are not told (simulator only)."""

    @model_validator(mode="after")
    def _one_end(self) -> "Trace":
        if (self.duration_s is None) == (self.num_requests is None):
            raise ValueError("give exactly one of duration_s and num_requests")
        return self

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Read a trace; a relative `profile` counts from the trace's folder.

        Raises:
            ConfigError: the file cannot be read or says something impossible; the message names it.
        """
        try:
            trace = cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"trace {path} cannot be read: {error}") from error
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"trace {path} is wrong: {found}") from error
        if trace.profile is not None and not trace.profile.is_absolute():
            return trace.model_copy(update={"profile": path.parent / trace.profile})
        return trace

    @property
    def expected_s(self) -> float:
        """Time in which the requests arrive, about, in seconds."""
        return self.duration_s or (self.num_requests or 0) / self.arrivals.rate_per_s

    def requests(self) -> Iterator[TraceRequest]:
        """The requests in order of arrival; the same for the same trace and seed."""
        arrivals, prompts, outputs, classes = (
            np.random.default_rng(child) for child in np.random.SeedSequence(self.seed).spawn(4)
        )
        number = 0
        for times in self.arrivals.times(arrivals):
            is_background = classes.random(_BLOCK) < self.background_share
            columns = (times, self.prompt_tokens.draw(prompts, _BLOCK), self.output_tokens.draw(outputs, _BLOCK))
            rows = zip(*(column.tolist() for column in columns), is_background.tolist(), strict=True)
            for arrival_s, num_prompt, num_output, background in rows:
                if number == self.num_requests or (self.duration_s and arrival_s >= self.duration_s):
                    return
                yield TraceRequest(
                    f"r{number}", arrival_s, num_prompt, num_output, BACKGROUND_PRIORITY if background else 0
                )
                number += 1
