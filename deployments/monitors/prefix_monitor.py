"""The sharing ratio: prompt tokens served from the prefix cache over all prompt tokens, by the engine's own counts."""

from collections import deque
from collections.abc import Callable
from typing import Any

from deployments.monitors.metrics import Meter
from engine.prefix_cache import PrefixCounts, read_prefix_counts

_WINDOW = 60
"""Readings; one comes each second."""


class PrefixMonitor:
    """One per executor."""

    def __init__(self, read: Callable[[], PrefixCounts | None] = read_prefix_counts) -> None:
        self._read = read
        self._readings: deque[PrefixCounts] = deque([PrefixCounts(0, 0)], maxlen=_WINDOW)
        self._meter = Meter("executor")

    def observe(self) -> None:
        """Read the engine's counts; call about once a second."""
        counts = self._read()
        if counts is None:
            return
        self._readings.append(counts)
        if counts.prompt_tokens:
            self._meter.set_gauge("prefix_sharing_ratio", counts.cached_tokens / counts.prompt_tokens)

    def summary(self) -> dict[str, Any]:
        """Tokens since the start and the ratio, also over the last minute; a ratio is None without prompts."""
        oldest, newest = self._readings[0], self._readings[-1]
        return {
            "prompt_tokens": newest.prompt_tokens,
            "cached_tokens": newest.cached_tokens,
            "sharing_ratio": _ratio(newest.cached_tokens, newest.prompt_tokens),
            "recent_sharing_ratio": _ratio(
                newest.cached_tokens - oldest.cached_tokens, newest.prompt_tokens - oldest.prompt_tokens
            ),
        }


def _ratio(cached_tokens: int, prompt_tokens: int) -> float | None:
    return cached_tokens / prompt_tokens if prompt_tokens > 0 else None
