"""Best fit (paper, Algorithm 1): put a task where it leaves the least unused capacity.

`f = λ1·|memory fit| + λ2·|latency fit|`, both terms normalised by the bin's capacity (the prototype's were in
MB and ms, so memory decided alone). The lowest score wins; a bin is never filled over its capacity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from core.config import SchedulerConfig


@dataclass(frozen=True, slots=True)
class Demand:
    """What a task needs."""

    memory_bytes: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Bin:
    """Capacity and use of one iteration, or of one executor."""

    bin_id: str
    memory_capacity_bytes: float
    latency_capacity_s: float
    memory_used_bytes: float = 0.0
    latency_used_s: float = 0.0

    def fits(self, demand: Demand) -> bool:
        """Whether the demand stays within both capacities."""
        return (
            self.memory_used_bytes + demand.memory_bytes <= self.memory_capacity_bytes
            and self.latency_used_s + demand.latency_s <= self.latency_capacity_s
        )

    def score(self, demand: Demand, config: SchedulerConfig) -> float:
        """The paper's f after placing the demand, both terms in [0, 1]; call only if it fits."""
        memory_left = self.memory_capacity_bytes - self.memory_used_bytes - demand.memory_bytes
        latency_left = self.latency_capacity_s - self.latency_used_s - demand.latency_s
        memory_fit = abs(memory_left) / max(self.memory_capacity_bytes, 1e-9)
        latency_fit = abs(latency_left) / max(self.latency_capacity_s, 1e-9)
        return config.lambda_memory * memory_fit + config.lambda_latency * latency_fit


def best_fit(demand: Demand, bins: Sequence[Bin], config: SchedulerConfig) -> Bin | None:
    """The bin with the lowest score among those with room; ties by id; None if nothing has room."""
    candidates = [candidate for candidate in bins if candidate.fits(demand)]
    if not candidates:
        return None
    return min(candidates, key=lambda candidate: (candidate.score(demand, config), candidate.bin_id))
