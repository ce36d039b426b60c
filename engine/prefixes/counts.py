"""What vLLM's prefix cache served, from vLLM's own counters in this process."""

from dataclasses import dataclass

import prometheus_client

_QUERIED = "vllm:prefix_cache_queries_total"
_HIT = "vllm:prefix_cache_hits_total"


@dataclass(frozen=True, slots=True)
class PrefixCounts:
    """Prompt tokens of started requests since the start; a request that was preempted counts once."""

    prompt_tokens: int
    cached_tokens: int
    """Those among them whose keys and values were in the cache already."""


def read_prefix_counts() -> PrefixCounts | None:
    """The counts of all engines of this process; None if vLLM keeps no statistics (`disable_log_stats`)."""
    registry = prometheus_client.REGISTRY.restricted_registry([_QUERIED, _HIT])
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    totals = {
        name: sum(sample.value for sample in samples if sample.name == name) for name in {s.name for s in samples}
    }
    if _QUERIED not in totals:
        return None
    return PrefixCounts(int(totals[_QUERIED]), int(totals.get(_HIT, 0)))
