"""Computes the hottest shared prefixes of recent traffic for a version that is about to go live.

Keys in vLLM's prefix cache belong to one version: its name is part of their hash. So the first requests after a
publish would all compute system prompts and conversations again, at the same moment. Here that is done before the
name moves: as background requests, one at a time and in steps, so that a user waits for one step at most.
It has a time limit and can only fail alone: the version goes live all the same, with what was warmed until then.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.alignment_config import VersionsConfig
from core.ports import EnginePort
from scheduler.prefixes.hot import HotPrefixes

logger = logging.getLogger(__name__)

_STEP_S = 0.02
"""A prompt in progress is not overtaken, only its successor: a user may wait for one step, so it should be short."""
_STEP_TOKENS = 128
"""The first step, and the least: below it an iteration's fixed part is most of a step."""
_CACHE_SHARE = 0.25
"""Part of the KV cache that warming may fill: the rest keeps what other versions and the base have there."""


@dataclass(slots=True)
class PublishTiming:
    """Durations of a publish, in seconds, and what was warmed for it."""

    load_s: float = 0.0
    """Loading into vLLM and the trainer."""
    warm_s: float = 0.0
    """Computing shared prefixes; requests go on meanwhile, on the version before."""
    warmed_prefixes: int = 0
    warmed_tokens: int = 0
    """Tokens whose keys are in the cache now; those that prefixes share count once."""
    warm_error: str | None = None
    """The reason why warming ended early; None if it did not."""
    warm_failures: int = 0
    """Times that warming ended early, for lack of time too, since the start."""
    move_s: float | None = None
    """The pointer move itself; None while the version is only on trial."""

    def to_wire(self) -> dict[str, Any]:
        """JSON values, without `move_s` before the move."""
        return {name: value for name, value in asdict(self).items() if name != "move_s" or value is not None}


class PrefixWarmer:
    """The warmer of an executor: `observe` the prompts for `<name>`, `warm` a version before `<name>` moves to it."""

    def __init__(self, engine: EnginePort, config: VersionsConfig) -> None:
        self._engine = engine
        self._config = config
        block_tokens = engine.prefix_block_tokens if config.warm_prefixes > 0 else None
        self._hot = HotPrefixes(block_tokens) if block_tokens is not None else None
        self._block_tokens = block_tokens or 1
        self.num_failures = 0
        """`PublishTiming.warm_failures`."""

    def observe(self, prompt_ids: Sequence[int]) -> None:
        """Count a prompt that was asked of the live name."""
        if self._hot is not None:
            self._hot.observe(prompt_ids)

    async def warm(self, handle: Any) -> PublishTiming:
        """Let a loaded version compute the hottest prefixes, within `versions.warm_timeout_s`. Never raises."""
        timing = PublishTiming()
        if self._hot is None:
            return timing
        started_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._config.warm_timeout_s):
                await self._compute(handle, self._hot, timing)
        except TimeoutError:
            timing.warm_error = f"stopped after {self._config.warm_timeout_s:g} s"
        except Exception as failure:  # whatever it is, the version goes live
            timing.warm_error = f"{type(failure).__name__}: {failure}"
            logger.exception("prefixes could not be warmed")
        self.num_failures += timing.warm_error is not None
        timing.warm_s = time.perf_counter() - started_s
        return timing

    async def _compute(self, handle: Any, hot: HotPrefixes, timing: PublishTiming) -> None:
        max_tokens = int(_CACHE_SHARE * (self._engine.kv_cache_tokens or 0))
        pace = StepPace(self._block_tokens)
        for prefix in hot.hottest(self._config.warm_prefixes, max_tokens):
            known = len(prefix.token_ids) - prefix.new_tokens  # a hotter one begins so too
            while known < len(prefix.token_ids):
                end = min(known + pace.num_tokens, len(prefix.token_ids))
                started_s = time.perf_counter()
                num_cached = await self._engine.prefill(handle, list(prefix.token_ids[:end]))
                # What had been cached (a canary that goes live) took no time and teaches nothing.
                pace.note(end - max(known, num_cached), time.perf_counter() - started_s)
                timing.warmed_tokens += end - known
                known = end
            timing.warmed_prefixes += 1


class StepPace:
    """Sets the number of tokens of the next step so that it lasts about `_STEP_S`; always whole blocks."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._least = max(1, _STEP_TOKENS // block_tokens) * block_tokens
        self.num_tokens = self._least

    def note(self, num_tokens: int, wall_s: float) -> None:
        """Learn from a step. It may have waited for users, so the next one grows to twice this one at most."""
        if num_tokens < self.num_tokens:
            return  # the short end of a prefix is mostly an iteration's fixed part
        fitting = num_tokens * min(2.0, _STEP_S / max(wall_s, 1e-6))
        self.num_tokens = max(self._least, int(fitting) // self._block_tokens * self._block_tokens)
