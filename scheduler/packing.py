"""Best fit (paper, Algorithm 1): put a task where, and as large as, it leaves the least unused capacity.

`f = λ1·|memory fit| + λ2·|latency fit|`, both terms normalised by the bin's capacity (the prototype's were in
MB and ms, so memory decided alone). The lowest score wins; a bin is never filled over its capacity; a failed try
changes nothing. A task may come as several candidates of different sizes: the packer then chooses how much of it.

A task may take memory that it does not find free, if KV blocks are pruned for it. Those bytes stand in f for what
they are, a departure from a perfect memory fit, on the other side and dearer by the harm that dropping them does:

    f = λ1·(bytes left / capacity + (pruned bytes / capacity)·(1 + harm)) + λ2·(seconds left / capacity)

with harm from 0 (attention will not miss the blocks) to 1. So of two chunks of a prompt the larger one is pruned for
if the time that it fills is worth more than the memory that it takes, and a task for which there is no memory at all
has only pruned candidates. Nothing is dropped for a candidate that finds its memory free.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from core.config import ExperimentsConfig

LAMBDA_MEMORY = LAMBDA_LATENCY = 0.5
"""λ1 and λ2: a byte's share of the memory and a second's share of the time count alike."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Memory and time that a task, or one size of it, needs."""

    memory_bytes: float
    latency_s: float
    pruned_bytes: float = 0.0
    """KV memory that is dropped for it; the bin has so much more room for it."""
    harm: float = 0.0
    """Mean harm of dropping them, 0 to 1."""


@dataclass(slots=True)
class Bin:
    """Capacity and use of one iteration, or of one executor."""

    bin_id: str
    memory_capacity_bytes: float
    latency_capacity_s: float
    memory_used_bytes: float = 0.0
    latency_used_s: float = 0.0

    def fits(self, demand: Demand) -> bool:
        """True if the demand stays within both capacities."""
        return (
            self.memory_used_bytes + demand.memory_bytes - demand.pruned_bytes <= self.memory_capacity_bytes
            and self.latency_used_s + demand.latency_s <= self.latency_capacity_s
        )

    def add(self, demand: Demand) -> None:
        """Take the demand's share; call only if it fits."""
        self.memory_used_bytes += demand.memory_bytes - demand.pruned_bytes
        self.latency_used_s += demand.latency_s

    def score(self, demand: Demand) -> float:
        """The paper's f after placing the demand, each term in [0, 1] without pruning; call only if it fits."""
        memory_left = self.memory_capacity_bytes - self.memory_used_bytes - demand.memory_bytes
        if demand.pruned_bytes:
            memory_left = max(0.0, memory_left) + demand.pruned_bytes * (1 + demand.harm)
        latency_left = self.latency_capacity_s - self.latency_used_s - demand.latency_s
        memory_fit = abs(memory_left) / max(self.memory_capacity_bytes, 1e-9)
        latency_fit = abs(latency_left) / max(self.latency_capacity_s, 1e-9)
        return LAMBDA_MEMORY * memory_fit + LAMBDA_LATENCY * latency_fit


def best_fit(demand: Demand, bins: Sequence[Bin]) -> Bin | None:
    """The bin with the lowest score among those with room; ties by id; None if nothing has room."""
    with_room = (candidate for candidate in bins if candidate.fits(demand))
    return min(with_room, key=lambda candidate: (candidate.score(demand), candidate.bin_id), default=None)


def first_fit(demand: Demand, bins: Sequence[Bin]) -> Bin | None:
    """The ablation of `best_fit`: the first bin with room, in the order given."""
    return next((candidate for candidate in bins if candidate.fits(demand)), None)


def choose_candidate(candidates: Sequence[Demand], into: Bin, experiments: ExperimentsConfig) -> int | None:
    """Index of the candidate to put into one bin; None if none fits. Ties go to the earlier one.

    With `packing: first_fit` the first candidate that fits is taken, whatever room it leaves.
    """
    fitting = [i for i, candidate in enumerate(candidates) if into.fits(candidate)]
    if experiments.packing == "first_fit":
        return fitting[0] if fitting else None
    return min(fitting, key=lambda i: into.score(candidates[i]), default=None)
