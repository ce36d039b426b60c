"""The executor that a prompt should go to: Algorithm 1's bins and fit, turned from packing to spreading.

An executor is a bin: `tau_mem` of its KV memory, and the TTFT target as its seconds. What a prompt demands of it is
the part that is not in its prefix cache: `n = max(1, prompt - cached)` tokens of KV memory and

    TTFT = wait_s + (waiting_tokens + n) * prompt_token_s

Both capacities are hard limits. Among the executors within them the one with the **highest** f is taken:

    f = λ1·|memory left / capacity| + λ2·|1 - TTFT / target|

It is the paper's f after the placement, so a cached prefix counts for what it saves, in bytes and in seconds, and
needs no weight of its own. The paper takes the lowest f, because a full iteration is a good iteration: what is left
of it is lost. An executor's room is not lost, it is the next request's TTFT and the fine-tune slices' time. Lowest f
would load each executor to its TTFT limit before the next one gets anything, so requests are spread, fine-tune tasks
are packed (`packing.best_fit`).

If no executor is within both limits, the lowest predicted TTFT wins, those with memory first: without it a request
would wait for others to end, which the prediction does not know.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.wire import ExecutorLoad
from scheduler.packing import Bin, Demand


@dataclass(frozen=True, slots=True)
class RankedExecutor:
    """One executor's fitness for one prompt."""

    executor_id: str
    predicted_ttft_s: float
    """Infinite if the executor never measured a prompt."""
    has_memory: bool
    """The prompt stays within `tau_mem` of its KV memory."""
    meets_target: bool
    room: float | None
    """The paper's f after the placement, in [0, 1]; None outside the limits."""
    num_running: int

    @property
    def order(self) -> tuple[float, ...]:
        """Sorts the best first; equal ones are told apart by their id."""
        if self.room is not None:
            return (0.0, -self.room, self.predicted_ttft_s, self.num_running)
        return (1.0, float(not self.has_memory), self.predicted_ttft_s, self.num_running)


def predict_ttft_s(prompt_tokens: int, cached_tokens: int, load: ExecutorLoad) -> float:
    """Seconds to the first token of a prompt sent now; infinite if the executor never measured one."""
    if load.prompt_token_s is None:
        return math.inf
    return load.wait_s + (load.waiting_tokens + _uncached(prompt_tokens, cached_tokens)) * load.prompt_token_s


def choose_executor(
    prompt_tokens: int,
    loads: Sequence[ExecutorLoad],
    cached_prefix_tokens: Mapping[str, int],
    tau_mem: float,
) -> list[RankedExecutor]:
    """Rank executors for a prompt, best first, as the module says. An executor without cached tokens may be absent."""
    ranking = (
        _rank(prompt_tokens, cached_prefix_tokens.get(load.executor_id, 0), load, tau_mem) for load in loads
    )
    return sorted(ranking, key=lambda ranked: (ranked.order, ranked.executor_id))


def _rank(prompt_tokens: int, cached_tokens: int, load: ExecutorLoad, tau_mem: float) -> RankedExecutor:
    ttft_s = predict_ttft_s(prompt_tokens, cached_tokens, load)
    kv_bytes = _uncached(prompt_tokens, cached_tokens) * load.kv_bytes_per_token
    used_bytes = load.kv_capacity_bytes - load.free_kv_bytes
    executor = Bin(
        bin_id=load.executor_id,
        memory_capacity_bytes=tau_mem * load.kv_capacity_bytes,
        latency_capacity_s=load.ttft_target_s,
        memory_used_bytes=used_bytes,
    )
    demand = Demand(kv_bytes, ttft_s)
    return RankedExecutor(
        executor_id=load.executor_id,
        predicted_ttft_s=ttft_s,
        has_memory=executor.fits(Demand(kv_bytes, 0.0)),
        meets_target=ttft_s <= load.ttft_target_s,
        room=executor.score(demand) if executor.fits(demand) else None,
        num_running=load.num_running,
    )


def _uncached(prompt_tokens: int, cached_tokens: int) -> int:
    """Prompt tokens to compute; the last one always is, cached or not."""
    return max(1, prompt_tokens - max(0, cached_tokens))
