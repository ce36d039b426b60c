"""Routers: they choose the executor that a request goes to.

`PlacementRouter` is the production ranking with loads that are never stale. It looks at every executor in Python, so
large clusters use `LeastLoadedRouter`: least predicted work, from a number kept for each executor.
"""

from collections.abc import Sequence

from core.batch import ForwardShape
from core.config import AppArgs
from core.wire import ExecutorLoad
from profiler.profile import LatencyModel
from scheduler.placement import choose_executor
from simulator.executor import SimulatedExecutor
from simulator.hardware import Hardware
from simulator.running import SimRequest

_PROMPT = 256
_BATCH = 32
_CONTEXT = 256
"""Tokens and requests of the passes that the costs of one token are taken from."""


class LeastLoadedRouter:
    """Least predicted work: prompt tokens plus the answer's expected length, at the profile's cost of a token."""

    def __init__(self, num_executors: int, latency: LatencyModel) -> None:
        self._work_ns = [0] * num_executors
        self._prompt_token_ns = _prompt_token_s(latency) * 1e9
        decode = ForwardShape(num_decode=_BATCH, decode_context=_BATCH * _CONTEXT)
        self._output_token_ns = latency.forward_s(decode) / _BATCH * 1e9
        self._num_ended = 0
        self._output_tokens = 0

    def choose(self, request: SimRequest, now_s: float) -> int:  # noqa: ARG002
        """Choose the executor with the least work; ties go to the first."""
        expected = self._output_tokens / self._num_ended if self._num_ended else _CONTEXT
        request.work_ns = int(request.num_prompt_tokens * self._prompt_token_ns + expected * self._output_token_ns)
        executor = self._work_ns.index(min(self._work_ns))
        self._work_ns[executor] += request.work_ns
        return executor

    def ended(self, request: SimRequest, executor: int) -> None:
        """Take the request's work off; its length tells what to expect of the next one."""
        self._work_ns[executor] -= request.work_ns
        self._num_ended += 1
        self._output_tokens += request.num_output_tokens


class PlacementRouter:
    """`scheduler.placement.choose_executor`, as the routers of a deployment apply it. No prefix is ever cached."""

    def __init__(
        self,
        executors: Sequence[SimulatedExecutor],
        args: AppArgs,
        hardware: Hardware,
    ) -> None:
        self._executors = executors
        self._prompt_token_s = _prompt_token_s(hardware.profile.latency)
        self._kv_bytes_per_token = hardware.limits.kv_bytes_per_token
        self._tau_mem = args.scheduler.tau_mem
        self._ttft_s = args.slo.ttft_s

    def choose(self, request: SimRequest, now_s: float) -> int:
        """Choose the executor of the best rank."""
        if len(self._executors) == 1:
            return 0
        loads = [self._load(executor, now_s) for executor in self._executors]
        return int(choose_executor(request.num_prompt_tokens, loads, {}, self._tau_mem)[0].executor_id)

    def ended(self, request: SimRequest, executor: int) -> None:
        """Remember nothing."""

    def _load(self, executor: SimulatedExecutor, now_s: float) -> ExecutorLoad:
        running = executor.requests.running
        capacity = running.kv_capacity
        return ExecutorLoad(
            executor_id=f"{executor.index:04d}",
            reported_s=now_s,
            free_kv_bytes=(capacity - executor.kv_tokens_used(now_s)) * self._kv_bytes_per_token,
            kv_capacity_bytes=capacity * self._kv_bytes_per_token,
            kv_bytes_per_token=self._kv_bytes_per_token,
            ttft_target_s=self._ttft_s,
            waiting_tokens=executor.requests.waiting_tokens + sum(r.left for r in running.prefills),
            num_running=running.num_decode,
            prompt_token_s=self._prompt_token_s,
            wait_s=executor.wait_s(now_s),
        )


def _prompt_token_s(latency: LatencyModel) -> float:
    """Seconds that one more prompt token takes."""
    short, long = ForwardShape(), ForwardShape()
    short.add_chunk(_PROMPT, 0)
    long.add_chunk(2 * _PROMPT, 0)
    return max(0.0, latency.forward_s(long) - latency.forward_s(short)) / _PROMPT
