"""What a simulation found, for people and for JSON."""

from dataclasses import dataclass
from typing import Any

from simulator.statistics import ClassCount, Histogram, Statistics


@dataclass(frozen=True, slots=True)
class Result:
    """One run. Rates are over `virtual_s`, the time until the last request (or the trace) ended."""

    name: str
    policy: str
    seed: int
    num_executors: int
    num_requests: int
    virtual_s: float
    statistics: Statistics

    @property
    def ttft(self) -> Histogram:
        """TTFT of all classes."""
        merged = Histogram()
        for count in self.statistics.classes.values():
            merged.include(count.ttft)
        return merged

    @property
    def num_finished(self) -> int:
        """Requests that got their last token."""
        return sum(count.finished for count in self.statistics.classes.values())

    @property
    def slo_attainment(self) -> float | None:
        """Share of requests with TTFT and every TBT within the targets; None without requests."""
        attained = sum(count.attained for count in self.statistics.classes.values())
        return attained / self.num_finished if self.num_finished else None

    @property
    def pairs_per_s(self) -> float:
        """Preference pairs of finished optimizer steps."""
        return self.statistics.pairs / self.virtual_s

    @property
    def utilisation(self) -> float:
        """Share of virtual time that forward passes and slices take."""
        return self._share(self.statistics.forward_s + self.statistics.slices_s)

    def to_json(self) -> dict[str, Any]:
        """Built-in types only; the same for the same trace, profile and seed."""
        found = self.statistics
        return {
            "trace": self.name,
            "policy": self.policy,
            "seed": self.seed,
            "executors": self.num_executors,
            "requests": self.num_requests,
            "finished": self.num_finished,
            "virtual_s": self.virtual_s,
            "slo_attainment": self.slo_attainment,
            "ttft": self.ttft.summary(),
            "tbt": found.tbt.summary(),
            "late_tokens": found.late_tokens,
            "classes": {name: _class_json(count) for name, count in found.classes.items() if count.finished},
            "pairs": found.pairs,
            "pairs_per_s": self.pairs_per_s,
            "output_tokens_per_s": found.output_tokens / self.virtual_s,
            "prompt_tokens_per_s": found.prompt_tokens / self.virtual_s,
            "utilisation": self.utilisation,
            "forward_share": self._share(found.forward_s),
            "slices_share": self._share(found.slices_s),
            "iterations": found.iterations,
            "slices": found.slices,
            "preemptions": found.preemptions,
            "pruned_blocks": found.pruned_blocks,
        }

    def _share(self, busy_s: float) -> float:
        return busy_s / (self.virtual_s * self.num_executors)


def _class_json(count: ClassCount) -> dict[str, Any]:
    return {
        "requests": count.finished,
        "slo_attainment": count.attained / count.finished,
        "ttft": count.ttft.summary(),
    }
