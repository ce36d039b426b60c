"""An executor's report to request routers: its queue, its KV memory, and how fast prompts have been lately.

The speed is learnt from the engine's own iterations: least squares of an iteration's wall time on its prompt tokens,
with forgetting. The slope is what one more prompt token costs, the intercept what an iteration costs without any
(decoding, slices, overhead).

How long a prompt waits follows from the iterations since the last report. One that comes at any moment of these `T`
seconds comes into iteration `i` with probability `wall_i / T` and waits for half of it: `sum(wall_i²) / 2T`. Then it
pays for what its own iteration does besides, if the engine has anything besides: the intercept, times the busy share
of `T`. An engine that did little is thus not taken for one that is always at work.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np

from core.batch import IterationSample
from core.wire import ExecutorLoad
from engine.vllm.engine import EngineLoad

_REPEAT_S = 5.0
"""A report that still holds is given again for so long: Serve tells every router of one that differs at all."""
_FORGETTING = 0.98
"""Weight of the past for each iteration that is seen: about the last 50 count."""


class PromptSpeed:
    """Learns the seconds of an iteration as `fixed_s + prompt_token_s * prompt tokens`."""

    def __init__(self) -> None:
        self._sums = np.zeros((2, 3))
        """Sums, with forgetting, of `[1, n]` times `[1, n, wall_s]` for iterations with `n` prompt tokens."""

    def observe(self, sample: IterationSample) -> None:
        """Take in one measured iteration."""
        num_tokens = sample.shape.num_prefill_tokens
        self._sums = _FORGETTING * self._sums + np.outer((1, num_tokens), (1, num_tokens, _wall_s(sample)))

    @property
    def prompt_token_s(self) -> float | None:
        """Seconds that one more prompt token takes; None before any prompt token was measured."""
        (weight, tokens, seconds), (_, tokens_squared, tokens_seconds) = self._sums.tolist()
        if tokens == 0:
            return None
        spread = weight * tokens_squared - tokens**2
        slope = weight * tokens_seconds - tokens * seconds
        if spread > 1e-9 * weight * tokens_squared and slope > 0:
            return float(slope / spread)
        return float(tokens_seconds / tokens_squared)  # one size of chunk only, or noise: all time is theirs

    @property
    def fixed_s(self) -> float:
        """Seconds of an iteration apart from its prompt tokens."""
        weight, tokens, seconds = self._sums[0].tolist()
        per_token_s = self.prompt_token_s or 0.0
        return max(0.0, (seconds - per_token_s * tokens) / weight) if weight else 0.0


class LoadMeter:
    """Makes an executor's reports. `clock` is the wall clock, which routers compare with theirs."""

    def __init__(self, executor_id: str, ttft_target_s: float, clock: Callable[[], float] = time.time) -> None:
        self._executor_id = executor_id
        self._ttft_target_s = ttft_target_s
        self._clock = clock
        self._speed = PromptSpeed()
        self._measured_s = clock()
        self.latest: ExecutorLoad | None = None
        """The last report; None before the first."""

    def measure(self, load: EngineLoad, samples: Sequence[IterationSample]) -> ExecutorLoad:
        """Report the engine's queue, and what its iterations since the last call say of its speed.

        The last report comes again, with its time, while nothing has changed; a few seconds later it has a new time.
        """
        for sample in samples:
            self._speed.observe(sample)
        now_s = self._clock()
        period_s, self._measured_s = now_s - self._measured_s, now_s
        report = ExecutorLoad(
            executor_id=self._executor_id,
            reported_s=now_s,
            ttft_target_s=self._ttft_target_s,
            prompt_token_s=self._speed.prompt_token_s,
            wait_s=_wait_s([_wall_s(sample) for sample in samples], period_s, self._speed.fixed_s),
            **asdict(load),
        )
        latest = self.latest
        if latest is None or now_s - latest.reported_s >= _REPEAT_S or replace(latest, reported_s=now_s) != report:
            self.latest = latest = report
        return latest


def _wall_s(sample: IterationSample) -> float:
    return sample.forward_s + sample.overhead_s + sample.slices_s


def _wait_s(walls_s: list[float], period_s: float, fixed_s: float) -> float:
    """Expected wait of a prompt that comes at any moment of the period. See the module docstring."""
    busy_s = sum(walls_s)
    if busy_s <= 0.0:
        return 0.0
    period_s = max(period_s, busy_s)  # iterations may overlap, and the first ones began before the meter
    return sum(wall_s * wall_s for wall_s in walls_s) / (2 * period_s) + busy_s / period_s * fixed_s
