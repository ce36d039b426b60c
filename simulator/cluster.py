"""A whole run: executors, the router before them, and the loop over events.

Everything random comes from the seed, and events are in a total order, so the same trace, profile and seed give the
same run and the same event log, byte for byte.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from core.batch import ForwardShape, IterationSample
from core.config import EngineConfig
from core.errors import ConfigError
from core.types import SliceReport
from scheduler.iteration.planner import EngineLimits, IterationPlanner
from scheduler.queues.waiting import WaitingQueue
from simulator.device import Device
from simulator.events import EventKind, EventQueue
from simulator.executor import Executor
from simulator.hardware import FrozenPredictor, Hardware
from simulator.kv_pruning import KvPruner
from simulator.requests import RequestPool
from simulator.result import Result
from simulator.routing import LeastLoadedRouter, PlacementRouter, Router
from simulator.running import RunningSet, SimRequest
from simulator.statistics import Statistics
from simulator.token_meter import TokenMeter
from simulator.trace import Trace
from simulator.trainer import Trainer

_NOISE_STREAM = 1
"""Keeps the devices' seeds apart from the trace's."""
_BUCKETS = 100
"""Points of the series over time."""
_LARGE_REQUESTS = 200_000
_LARGE_STEP = 8
_MOST_RANKED = 8
"""Executors up to which `auto` ranks all of them for each request."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to simulate; nothing in here belongs to the deployment that is simulated."""

    noise: bool = True
    adapt: bool = True
    """Planners learn from the simulated iterations, as in production."""
    observe_every: int | None = None
    """Feed every n-th iteration of an executor to its planner. None: each one, but every 8th from 200,000 requests
    on: there learning would cost more than simulating."""
    router: Literal["auto", "placement", "least_loaded"] = "auto"
    """`auto`: `placement` for up to 8 executors."""
    fast: bool = True
    """Skip plans where they decide nothing. False is for the test that this changes nothing."""


class Simulation:
    """One run of a trace; `run` may be called once.

    Raises (constructor):
        ConfigError: the settings could not run on an engine either.
    """

    def __init__(
        self,
        trace: Trace,
        hardware: Hardware,
        options: Options | None = None,
        *,
        write_log: Callable[[str], object] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        _check(trace.args.engine)
        self._trace = trace
        self._hardware = hardware
        self._options = options or Options()
        self._write_log = write_log
        self._events = EventQueue()
        self._statistics = statistics or Statistics(trace.args.slo, _bucket_s(trace))
        seeds = np.random.SeedSequence([trace.seed, _NOISE_STREAM]).spawn(trace.executors)
        self.executors = [self._executor(index, seed) for index, seed in enumerate(seeds)]
        self._router = self._new_router()
        self._requests = trace.requests()
        self._next_request: SimRequest | None = None
        self._num_arrived = 0
        self._num_ended = 0

    def run(self) -> Result:
        """Simulate until the last request has ended, and the trace's duration is over."""
        events = self._events
        for executor in self.executors:
            executor.start(0.0)
        self._plan_arrival()
        self._plan_task()
        duration_s = self._trace.duration_s or 0.0
        while (next_s := events.next_time_s()) is not None:
            if self._next_request is None and self._num_ended == self._num_arrived and next_s > duration_s:
                break
            now_s, kind, _, index, work = events.pop()
            if kind == EventKind.ITERATION_END:
                self._end(self.executors[index], work, now_s)
            elif kind == EventKind.ARRIVAL:
                self._arrive(now_s)
            else:
                self._add_task(now_s)
        return Result(
            name=self._trace.name,
            policy=self._trace.args.scheduler.policy,
            seed=self._trace.seed,
            num_executors=len(self.executors),
            num_requests=self._num_arrived,
            virtual_s=max(events.now_s, duration_s),
            statistics=self._statistics,
        )

    def _end(self, executor: Executor, work: int, now_s: float) -> None:
        executor.end(work, now_s)
        if executor.meter.finished:
            for request in executor.meter.finished:
                self._router.ended(request, executor.index)
            self._num_ended += len(executor.meter.finished)
            executor.meter.finished.clear()

    def _arrive(self, now_s: float) -> None:
        request = self._next_request
        assert request is not None  # the event was scheduled with it
        index = self._router.choose(request, now_s)
        self._num_arrived += 1
        self._plan_arrival()
        self._log("arrived", request.request_id, index)
        self.executors[index].submit(request, now_s)

    def _plan_arrival(self) -> None:
        request = next(self._requests, None)
        self._next_request = None if request is None else SimRequest.of(request)
        if request is not None:
            self._events.push(request.arrival_s, EventKind.ARRIVAL)

    def _add_task(self, now_s: float) -> None:
        """A batch of pairs goes where the fewest tasks are."""
        executor = min(self.executors, key=lambda e: (e.trainer.num_tasks, len(e.requests), e.index))
        self._log("task", "", executor.index)
        self._plan_task()
        executor.add_task(now_s)

    def _plan_task(self) -> None:
        rate = self._trace.finetune.pairs_per_s
        training = self._trace.args.training
        if rate and training.enabled:
            self._events.push(self._events.now_s + training.pairs_per_step / rate, EventKind.TASK)

    def _executor(self, index: int, seed: np.random.SeedSequence) -> Executor:
        trace, hardware, options = self._trace, self._hardware, self._options
        device = Device(hardware.device, seed=seed, noise=options.noise, slow_down=trace.slow_down)
        trainer = self._trainer(device)
        planner = self._planner()
        if trace.args.training.enabled and trace.finetune.pairs_per_s != 0:
            trainer.measure_all_kinds()
            planner.observe(IterationSample(ForwardShape(), 0.0, report=SliceReport(trainer.warm_up)))
        running = RunningSet(
            max_seats=trace.args.engine.max_num_seqs,
            kv_tokens=hardware.kv_tokens,
            block_tokens=hardware.block_tokens,
        )
        pruning = trace.args.kv_pruning
        return Executor(
            index,
            planner=planner,
            device=device,
            trainer=trainer,
            requests=RequestPool(
                running=running,
                waiting=WaitingQueue(trace.args.experiments),
                kv_bytes_per_token=hardware.kv_bytes_per_token,
                pruner=None if pruning.start == "off" else KvPruner(pruning, hardware.block_tokens),
            ),
            meter=TokenMeter(index, self._statistics, None if self._write_log is None else self._log),
            statistics=self._statistics,
            schedule_end=self._schedule_end,
            observe_every=options.observe_every or _observe_every(trace),
            is_fast=options.fast,
        )

    def _trainer(self, device: Device) -> Trainer:
        finetune, training = self._trace.finetune, self._trace.args.training
        return Trainer(
            device=device,
            model=self._hardware.step_model,
            pair=(finetune.prompt_tokens, finetune.completion_tokens, finetune.completion_tokens),
            config=training,
            arena_bytes_per_token=self._hardware.arena_bytes_per_token,
            has_backlog=training.enabled and finetune.pairs_per_s is None,
            share_prompt=self._trace.args.experiments.share_prompt,
        )

    def _planner(self) -> IterationPlanner:
        hardware = self._hardware
        predictor = hardware.new_predictor()
        limits = EngineLimits(
            max_tokens=self._trace.args.engine.max_num_batched_tokens,
            kv_bytes=int(hardware.kv_tokens * hardware.kv_bytes_per_token),
            arena_bytes=hardware.arena_bytes,
            kv_bytes_per_token=hardware.kv_bytes_per_token,
            arena_fixed_bytes=hardware.arena_fixed_bytes,
            arena_bytes_per_token=hardware.arena_bytes_per_token,
            dims=hardware.dims,
        )
        return IterationPlanner(
            self._trace.args, predictor if self._options.adapt else FrozenPredictor(predictor), limits
        )

    def _new_router(self) -> Router:
        args, device = self._trace.args, self._hardware.device
        chosen = self._options.router
        if chosen == "least_loaded" or (chosen == "auto" and len(self.executors) > _MOST_RANKED):
            return LeastLoadedRouter(len(self.executors), device)
        return PlacementRouter(
            self.executors,
            device,
            kv_bytes_per_token=self._hardware.kv_bytes_per_token,
            tau_mem=args.scheduler.tau_mem,
            slo=args.slo,
        )

    def _schedule_end(self, executor: int, run: int, end_s: float) -> None:
        self._events.push(end_s, EventKind.ITERATION_END, executor, run)

    def _log(self, event: str, subject: str, executor: int) -> None:
        if self._write_log is not None:
            line = {"time_s": self._events.now_s, "event": event, "subject": subject, "executor": executor}
            self._write_log(json.dumps(line) + "\n")


def _check(engine: EngineConfig) -> None:
    if engine.max_num_seqs > engine.max_num_batched_tokens:
        raise ConfigError(
            f"engine.max_num_seqs ({engine.max_num_seqs}) must not be above engine.max_num_batched_tokens"
            f" ({engine.max_num_batched_tokens}): every running request needs a token in an iteration"
        )


def _observe_every(trace: Trace) -> int:
    return _LARGE_STEP if _expected_s(trace) * trace.arrivals.rate_per_s >= _LARGE_REQUESTS else 1


def _bucket_s(trace: Trace) -> float:
    return max(_expected_s(trace) / _BUCKETS, 1e-3)


def _expected_s(trace: Trace) -> float:
    """About how long the requests take to arrive."""
    return trace.duration_s or (trace.num_requests or 0) / trace.arrivals.rate_per_s
