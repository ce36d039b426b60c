"""One simulation: executors, the router before them, and the loop over events in virtual time.

Everything random comes from the seed, and events are in a total order, so the same trace, profile and seed give the
same run and the same event log, byte for byte.
"""

import heapq
import json
import math
from collections.abc import Callable
from enum import IntEnum
from functools import partial

import numpy as np

from core.errors import ConfigError
from simulator.executor import Options, SimulatedExecutor
from simulator.hardware import Hardware
from simulator.power import place_optimizer
from simulator.routing import LeastLoadedRouter, PlacementRouter
from simulator.running import SimRequest
from simulator.statistics import Result, Statistics
from simulator.trace import Trace

_NOISE_STREAM = 1
"""Keeps the devices' seeds apart from the trace's."""
_BUCKETS = 100
"""Points of the series over time."""
_MOST_RANKED = 8
"""Executors up to which `auto` ranks all of them for each request."""


class EventKind(IntEnum):
    """Events of one instant happen in this order.

    What ends comes before what arrives, so that a request that arrives at the end of an iteration finds the seats which
    that iteration has freed.
    """

    ITERATION_END = 0
    TASK = 1
    ARRIVAL = 2


Event = tuple[float, EventKind, int, Callable[[], None]]
"""Time in seconds, kind, sequence number, and what happens. Events are in a total order, as in simpy."""


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
        engine = trace.args.engine
        if engine.max_num_seqs > engine.max_num_batched_tokens:
            raise ConfigError(
                f"engine.max_num_seqs ({engine.max_num_seqs}) must not be above engine.max_num_batched_tokens"
                f" ({engine.max_num_batched_tokens}): every running request needs a token in an iteration"
            )
        self._trace = trace
        self._hardware = hardware
        self._options = options or Options()
        self._write_log = write_log
        self._events: list[Event] = []
        """Heap of what is to come."""
        self._num_events = 0
        self._now_s = 0.0
        self._statistics = statistics or Statistics(trace.args.slo, max(trace.expected_s / _BUCKETS, 1e-3))
        seeds = np.random.SeedSequence([trace.seed, _NOISE_STREAM]).spawn(trace.executors)
        self.executors = [self._executor(index, seed) for index, seed in enumerate(seeds)]
        self.router = self._new_router()
        self._requests = trace.requests()
        self._has_more = True
        """Requests are still to arrive."""
        self._num_arrived = 0
        self._num_ended = 0

    def run(self) -> Result:
        """Simulate until the last request has ended, and the trace's duration is over."""
        for executor in self.executors:
            executor.start(0.0)
        self._plan_arrival()
        self._plan_task()
        duration_s = self._trace.duration_s or 0.0
        while self._events:
            has_served_all = not self._has_more and self._num_ended == self._num_arrived
            if has_served_all and self._events[0][0] > duration_s:
                break
            self._now_s, _, _, happen = heapq.heappop(self._events)
            happen()
        return Result(
            trace=self._trace,
            num_requests=self._num_arrived,
            virtual_s=max(self._now_s, duration_s),
            statistics=self._statistics,
            placement=place_optimizer(self._trace.power, self._hardware.profile, self._trace.args),
            can_move=bool(self._hardware.profile.work),
        )

    def _push(self, time_s: float, kind: EventKind, happen: Callable[[], None]) -> None:
        """Schedule an event.

        Raises:
            ValueError: `time_s` is in the past or not a number.
        """
        if not time_s >= self._now_s:
            raise ValueError(f"an event at {time_s} s cannot be scheduled at {self._now_s} s")
        self._num_events += 1
        heapq.heappush(self._events, (time_s, kind, self._num_events, happen))

    def _end(self, index: int, run: int) -> None:
        executor = self.executors[index]
        executor.end(run, self._now_s)
        for request in executor.meter.finished:
            self.router.ended(request, executor.index)
        self._num_ended += len(executor.meter.finished)
        executor.meter.finished.clear()

    def _arrive(self, request: SimRequest) -> None:
        index = self.router.choose(request, self._now_s)
        self._num_arrived += 1
        self._plan_arrival()
        self._log("arrived", request.request_id, index)
        self.executors[index].submit(request, self._now_s)

    def _plan_arrival(self) -> None:
        request = next(self._requests, None)
        self._has_more = request is not None
        if len(self.executors) == 1:  # of several, the router has not chosen yet
            is_interactive = request is not None and request.user_priority <= 0
            self.executors[0].next_arrival_s = request.arrival_s if request and is_interactive else math.inf
        if request is not None:
            self._push(request.arrival_s, EventKind.ARRIVAL, partial(self._arrive, SimRequest.of(request)))

    def _add_task(self) -> None:
        """Send a batch of pairs where the fewest tasks are."""
        executor = min(self.executors, key=lambda e: (e.trainer.num_tasks, len(e.requests), e.index))
        self._log("task", "", executor.index)
        self._plan_task()
        executor.add_task(self._now_s)

    def _plan_task(self) -> None:
        rate = self._trace.finetune.pairs_per_s
        training = self._trace.args.training
        if rate and training.enabled:
            self._push(self._now_s + training.pairs_per_step / rate, EventKind.TASK, self._add_task)

    def _executor(self, index: int, seed: np.random.SeedSequence) -> SimulatedExecutor:
        return SimulatedExecutor(
            index,
            self._trace,
            self._hardware,
            self._options,
            seed=seed,
            statistics=self._statistics,
            log=None if self._write_log is None else self._log,
            schedule_end=lambda run, end_s: self._push(
                end_s, EventKind.ITERATION_END, partial(self._end, index, run)
            ),
        )

    def _new_router(self) -> LeastLoadedRouter | PlacementRouter:
        chosen = self._options.router
        if chosen == "least_loaded" or (chosen == "auto" and len(self.executors) > _MOST_RANKED):
            return LeastLoadedRouter(len(self.executors), self._hardware.profile.latency)
        return PlacementRouter(self.executors, self._trace.args, self._hardware)

    def _log(self, event: str, subject: str, executor: int) -> None:
        if self._write_log is not None:
            line = {"time_s": self._now_s, "event": event, "subject": subject, "executor": executor}
            self._write_log(json.dumps(line) + "\n")
