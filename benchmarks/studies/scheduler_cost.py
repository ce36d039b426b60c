"""Time that the decisions of one engine iteration take. `mace bench scheduler`.

The engine's own code on request-like objects, no device: memory record, view of 256 running and 1,000 waiting
requests, plan, waiting-queue operations of one arrival and one start, shape of the scheduled pass, settle, observe;
and one turn of the fine-tune queue with 500 tasks. The garbage collector is on. Latencies that `observe` is fed with
come from a made-up linear device with noise: they decide nothing but which branches run. Beside them
stands what it costs to time one chunk of an answer where it leaves the server.
"""

import asyncio
import gc
import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from benchmarks.harness.report import VERDICTS, AsJson, Out, show
from core.batch import EdgeReport, ForwardShape, IterationSample, Plan
from core.config import AppArgs, SloConfig
from core.types import SliceKind, SliceReport, SliceTiming
from deployments.monitors.edge import EdgeMeter
from scheduler.iteration.planner import EngineLimits, IterationPlanner
from scheduler.queues.finetune import QueuedTask, TaskQueue

TARGET_MEDIAN_MS = 0.2
TARGET_P99_MS = 1.0

_BLOCK_TOKENS = 16
_NUM_PREFIXES = 32
"""Different leading blocks that requests share."""
_GIB = 1 << 30
_KV_BYTES_PER_TOKEN = 12_288
_FREE_SEATS = 32
_MAX_TOKENS = 2048
_SLICES = (SliceKind.REFERENCE_LAYER, SliceKind.POLICY_LAYER, SliceKind.BACKWARD_LAYER, SliceKind.POLICY_HEAD)
"""Those that run in each iteration."""
_SLICE_TOKENS = 256
_WARM_UP = 500
"""Iterations that are not timed."""
_CHUNKS = 100_000


@dataclass(slots=True)
class StandInRequest:
    """The attributes of vLLM's `Request` that planning reads."""

    request_id: str
    arrival_time: float
    num_tokens: int
    num_computed_tokens: int
    priority: int = 0
    num_output_placeholders: int = 0
    block_hashes: tuple[int, ...] = ()
    sampling_params: None = None

    @property
    def num_prompt_tokens(self) -> int:
        """All of them, for a request that waits."""
        return self.num_tokens

    @property
    def num_tokens_with_spec(self) -> int:
        """Prompt and answer so far."""
        return self.num_tokens


def main(
    as_json: AsJson = False,
    running: Annotated[int, typer.Option(min=1, help="Running requests")] = 256,
    waiting: Annotated[int, typer.Option(min=1, help="Waiting requests")] = 1000,
    tasks: Annotated[int, typer.Option(min=1, help="Fine-tune tasks")] = 500,
    iterations: Annotated[int, typer.Option(min=100, help="Iterations timed")] = 5000,
    out: Out = None,
) -> None:
    """Measure the time that the decisions of one engine iteration take, without a device."""
    found = measure_cost(running, waiting, tasks, iterations)
    table = Table("part", "median, ms", "p99, ms", "max, ms")
    for name, part in {**found["parts"], "total": found["total"]}.items():
        table.add_row(name, *(f"{part[key]:.4f}" for key in ("median_ms", "p99_ms", "max_ms")))
    chunk = f"timing a chunk where it leaves the server: {found['edge_chunk_us']:.1f} us"
    show(found, [table, chunk, f"targets {VERDICTS[found['passed']]}: {found['targets']}"], as_json, out)


def measure_cost(num_running: int, num_waiting: int, num_tasks: int, iterations: int) -> dict[str, Any]:
    """Median and p99 of a decision, in milliseconds, in all and by part; and whether the targets are met."""
    engine = _PlanningEngine(num_running, num_waiting, num_tasks)
    for _ in range(_WARM_UP):
        engine.iterate()
    collected = sum(generation["collections"] for generation in gc.get_stats())
    laps_s = [engine.iterate() for _ in range(iterations)]
    total = _statistics_ms([sum(laps.values()) for laps in laps_s])
    return {
        "settings": {
            "num_running": num_running,
            "num_waiting": num_waiting,
            "num_tasks": num_tasks,
            "iterations": iterations,
            "warm_up": _WARM_UP,
            "seed": 0,
        },
        "total": total,
        "parts": {name: _statistics_ms([laps[name] for laps in laps_s]) for name in laps_s[0]},
        "edge_chunk_us": asyncio.run(_edge_chunk_us()),
        "gc_collections": sum(generation["collections"] for generation in gc.get_stats()) - collected,
        "targets": {"median_ms": TARGET_MEDIAN_MS, "p99_ms": TARGET_P99_MS},
        "passed": total["median_ms"] <= TARGET_MEDIAN_MS and total["p99_ms"] <= TARGET_P99_MS,
    }


class _PlanningEngine:
    """The scheduler side of an engine: as `engine.vllm.scheduler`, without vLLM's own scheduling."""

    def __init__(self, num_running: int, num_waiting: int, num_tasks: int) -> None:
        from engine.vllm.planning import KvPool
        from engine.vllm.task_table import TaskTable
        from engine.vllm.waiting_queue import AgeingRequestQueue
        from profiler.online import OnlineLatencyModel

        args = AppArgs(slo=SloConfig(ttft_s=1.0, tbt_s=0.1))
        self._rng = np.random.default_rng(0)
        block_bytes = _BLOCK_TOKENS * _KV_BYTES_PER_TOKEN
        self._pool = KvPool(8 * _GIB // block_bytes, block_bytes, _BLOCK_TOKENS)
        self._now_s = 1000.0
        self._number = 0
        self._waiting = AgeingRequestQueue(args.experiments, _BLOCK_TOKENS)
        self._tasks = TaskTable()
        self._queue: TaskQueue[int] = TaskQueue(args.experiments, args.scheduler.gamma)
        self._running = [self._request(prompt_done=True) for _ in range(num_running)]
        self._requests = {request.request_id: request for request in self._running}
        limits = EngineLimits(_MAX_TOKENS, 8 * _GIB, 2 * _GIB, kv_bytes_per_token=_KV_BYTES_PER_TOKEN)
        self._planner = IterationPlanner(args, OnlineLatencyModel(None), limits)
        for _ in range(num_waiting):
            self._waiting.add_request(self._request(prompt_done=False))
        for _ in range(num_tasks):
            self._queue.push(self._task())
            self._tasks.add(self._request(prompt_done=False), {"pairs": []}, self._now_s)

    def iterate(self) -> dict[str, float]:
        """One iteration, in which a request and a task come and one of each starts; the seconds of its parts."""
        from engine.vllm.planning import shape_of, view_of

        laps_s: dict[str, float] = {}

        def lap(name: str, started_s: float) -> float:
            ended_s = time.perf_counter()
            laps_s[name] = ended_s - started_s
            return time.perf_counter()

        self._now_s += 0.02
        self._waiting.now_s = self._now_s
        arriving, task = self._request(prompt_done=False), self._task()
        used_bytes = _KV_BYTES_PER_TOKEN * sum(request.num_computed_tokens for request in self._running)
        now_s = time.perf_counter()
        self._waiting.note_running(self._running)
        now_s = lap("prefix order", now_s)
        view = view_of(
            self._now_s,
            self._running,
            self._waiting,
            free_seats=_FREE_SEATS,
            pool=self._pool,
            free_kv_blocks=self._pool.num_blocks - used_bytes // self._pool.block_bytes,
            finetune=self._tasks.state(self._now_s),
        )
        now_s = lap("view", now_s)
        plan = self._planner.plan(view)
        now_s = lap("plan", now_s)
        self._planner.retrain.note_requests()
        self._waiting.add_request(arriving)
        started: StandInRequest = self._waiting.peek_request()
        self._waiting.pop_request()
        now_s = lap("waiting queue", now_s)
        scheduled = self._schedule(started, plan)
        now_s = time.perf_counter()
        shape = shape_of(scheduled, self._requests)
        now_s = lap("shape", now_s)
        plan = self._planner.settle(plan, view, shape)
        now_s = lap("settle", now_s)
        sample = self._sample(plan, shape)
        now_s = time.perf_counter()
        self._planner.observe(sample)
        self._tasks.note_progress(sample.report, self._now_s)
        now_s = lap("observe", now_s)
        self._queue.push(task)
        self._queue.peek()
        self._queue.pop()
        now_s = lap("fine-tune queue", now_s)
        # The oldest request ends, the started one takes its place, the others are one token further.
        del self._requests[self._running.pop(0).request_id]
        self._running.append(started)
        for request in self._running:
            request.num_tokens += 1
            request.num_computed_tokens = request.num_tokens - 1
        return laps_s

    def _schedule(self, started: StandInRequest, plan: Plan) -> dict[str, int]:
        """Stand in for vLLM: all running requests decode, the started one gets its chunk."""
        scheduled = {request.request_id: 1 for request in self._running}
        chunk = min(plan.max_chunk_tokens or started.num_tokens, started.num_tokens)
        scheduled[started.request_id] = chunk
        started.num_computed_tokens += chunk
        self._requests[started.request_id] = started
        return scheduled

    def _sample(self, plan: Plan, shape: ForwardShape) -> IterationSample:
        noise = self._rng.normal(1.0, 0.05, 1 + len(_SLICES)).tolist()
        forward_s = (4e-3 + 1e-4 * shape.num_tokens + 1e-8 * shape.decode_context) * noise[0]
        slices = [SliceTiming(k, _SLICE_TOKENS, 3e-3 * x) for k, x in zip(_SLICES, noise[1:], strict=True)]
        return IterationSample(shape, forward_s, 1e-3, SliceReport(slices), plan)

    def _request(self, *, prompt_done: bool) -> StandInRequest:
        self._number += 1
        length = int(self._rng.integers(16, 512))
        computed = length - 1 if prompt_done else 0
        hashes = (int(self._rng.integers(_NUM_PREFIXES)),) * (length // _BLOCK_TOKENS)
        return StandInRequest(f"r{self._number}", self._now_s, length, computed, block_hashes=hashes)

    def _task(self) -> QueuedTask[int]:
        self._number += 1
        return QueuedTask(f"t{self._number}", self._number, self._now_s, float(self._rng.uniform(0, 2)))


async def _edge_chunk_us() -> float:
    """Microseconds that it takes to note one chunk of a stream."""

    async def drop(_: EdgeReport) -> None:
        pass

    note = EdgeMeter(SloConfig(), drop).stream("interactive", 0.0)
    started_s = time.perf_counter()
    for number in range(_CHUNKS):
        note(0.01 * (number + 1))
    return 1e6 * (time.perf_counter() - started_s) / _CHUNKS


def _statistics_ms(values_s: list[float]) -> dict[str, float]:
    quantiles_ms = (1e3 * np.percentile(values_s, [50, 99, 100])).tolist()
    return dict(zip(("median_ms", "p99_ms", "max_ms"), quantiles_ms, strict=True))
