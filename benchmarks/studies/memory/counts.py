"""What vLLM counts about memory, taken from the statistics that it makes after every iteration."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Counts(BaseModel):
    """Between two moments. Shares are in 0..1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix_queries: int = 0
    """Prompt tokens of requests that began; a request that comes back after a preemption is not counted again."""
    prefix_hits: int = 0
    """Those of them that the prefix cache held."""
    preemptions: int = 0
    num_iterations: int = 0
    kv_use_mean: float | None = None
    """Share of the KV blocks in use, mean over iterations. Cached blocks that nobody uses are free."""
    kv_use_max: float | None = None
    max_running: int = 0
    """Most requests that ran at once."""

    @property
    def hit_ratio(self) -> float | None:
        """Share of prompt tokens that were not computed; None without a request."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else None


class StatLog:
    """A stat logger of vLLM (one engine) that adds up. Pass `StatLog.factory()` as one of `stat_loggers`."""

    def __init__(self) -> None:
        self.clear()

    def factory(self) -> Any:
        """What vLLM calls with its config and the engine's number; always this object."""
        return lambda _config, _engine_index=0: self

    def clear(self) -> None:
        """Forget all."""
        self._queries = self._hits = self._preemptions = self._iterations = self._max_running = 0
        self._use_sum = self._use_max = 0.0
        self.kv_use = 0.0
        """Of the last iteration."""

    def read(self) -> Counts:
        """Since the last `clear`."""
        some = self._iterations > 0
        return Counts(
            prefix_queries=self._queries,
            prefix_hits=self._hits,
            preemptions=self._preemptions,
            num_iterations=self._iterations,
            kv_use_mean=self._use_sum / self._iterations if some else None,
            kv_use_max=self._use_max if some else None,
            max_running=self._max_running,
        )

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Called by vLLM after every iteration that has something to say."""
        if scheduler_stats is not None:
            prefix = scheduler_stats.prefix_cache_stats
            self._queries += prefix.queries
            self._hits += prefix.hits
            self._iterations += 1
            self.kv_use = scheduler_stats.kv_cache_usage
            self._use_sum += self.kv_use
            self._use_max = max(self._use_max, self.kv_use)
            self._max_running = max(self._max_running, scheduler_stats.num_running_reqs)
        if iteration_stats is not None:
            self._preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface; nothing to say."""

    def log(self) -> None:
        """Part of vLLM's interface; nothing to say."""

    def record_sleep_state(self, *_: Any) -> None:
        """Part of vLLM's interface; the engine never sleeps here."""
