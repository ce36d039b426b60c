"""One executor of a simulation: the production planner in virtual time.

An iteration is: view, plan, fill as vLLM fills, settle, slices as far as admitted, forward pass; it lasts overhead +
slices + forward pass, and its tokens are out at its end.

While requests only decode, none waits and there is nothing to train, the planner decides nothing: then iterations are
simulated in a *stretch*, without views and plans, until a request ends or one arrives. Each iteration of a stretch has
its own latency, noise and sample, so the outcome is the same to the last bit.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from core.batch import ForwardShape, IterationSample, Plan
from core.errors import MaceError
from core.types import SliceReport
from scheduler.iteration.planner import IterationPlanner
from scheduler.memory.ledger import Pool
from simulator.device import Device
from simulator.hardware import FrozenPredictor, Hardware
from simulator.requests import Fill, RequestPool
from simulator.running import SimRequest
from simulator.statistics import Log, Statistics, TokenMeter
from simulator.trace import Trace
from simulator.trainer import Trained, Trainer

_LARGE_REQUESTS = 200_000
_LARGE_STEP = 8
_FIRST_STRETCH = 8
_LONGEST_STRETCH = 64
"""Iterations; a longer one would too often be thrown away by an arrival."""


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of the simulation itself, none of the deployment that is simulated."""

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


@dataclass(slots=True)
class _Planned:
    """The planner's part of an iteration; a stretch has none."""

    plan: Plan
    fill: Fill
    trained: Trained


@dataclass(slots=True)
class _Work:
    """The work in progress: an iteration, or a stretch of them with the same decoding requests."""

    start_s: float
    ends_s: list[float]
    forwards_s: list[float]
    overheads_s: list[float]
    planned: _Planned | None = None


class SimulatedExecutor:
    """See the module docstring. `schedule_end(run, end_s)` is told when the work in progress ends."""

    def __init__(
        self,
        index: int,
        trace: Trace,
        hardware: Hardware,
        options: Options,
        *,
        seed: np.random.SeedSequence,
        statistics: Statistics,
        log: Log | None,
        schedule_end: Callable[[int, float], None],
    ) -> None:
        self.index = index
        self._device = Device(hardware.profile, seed=seed, noise=options.noise, slow_down=trace.slow_down)
        self.trainer = Trainer(trace, hardware, self._device)
        self.requests = RequestPool(trace.args, hardware)
        self.meter = TokenMeter(index, statistics, log)
        predictor = hardware.new_predictor()
        known = predictor if options.adapt else FrozenPredictor(predictor)
        self.planner = IterationPlanner(trace.args, known, hardware.limits)
        if trace.args.training.enabled and trace.finetune.pairs_per_s != 0:
            self.planner.observe(IterationSample(ForwardShape(), 0.0, report=SliceReport(self.trainer.warm_up())))
        is_large = trace.expected_s * trace.arrivals.rate_per_s >= _LARGE_REQUESTS
        self._observe_every = options.observe_every or (_LARGE_STEP if is_large else 1)
        self._is_fast = options.fast
        self._statistics = statistics
        self._schedule_end = schedule_end
        self._run = 0
        self._work: _Work | None = None
        self._stretch_limit = _FIRST_STRETCH
        self._knows_no_work = False
        """The planner was told in its last view that there is nothing to train: its blocking phases end there."""
        self._iterations = 0
        self._newest_s = -math.inf
        """Arrival of the newest interactive request."""
        self._planned_s = -math.inf
        """Start of the iteration before."""
        self.next_arrival_s = math.inf
        """When the next interactive request comes here; infinite if that is not known."""

    def submit(self, request: SimRequest, now_s: float) -> None:
        """Take in a request.

        Raises:
            ConfigError: it can never fit the KV cache.
        """
        self.requests.running.check(request)
        self.planner.retrain.note_requests()
        if request.user_priority <= 0:
            self._newest_s = request.arrival_s
        self.requests.enqueue(request)
        self._wake(now_s)

    def add_task(self, now_s: float) -> None:
        """Take in fine-tune work."""
        self.trainer.add_task(now_s)
        self._wake(now_s)

    def end(self, run: int, now_s: float) -> None:
        """End work number `run`; nothing happens if it was cut short meanwhile."""
        work = self._work
        if run != self._run or work is None:
            return
        trained = work.planned.trained if work.planned else Trained()
        self._statistics.iterations += len(work.ends_s)
        self._statistics.slices += len(trained.slices)
        self._statistics.moved_s += trained.moved_s
        self._statistics.add_work(work.start_s, work.ends_s[-1], sum(work.forwards_s), trained.busy_s)
        self._device.take(len(work.ends_s))
        if work.planned is None:
            self._end_stretch(work)
        else:
            self._end_iteration(work, work.planned)
        self._work = None
        self.start(now_s)

    def start(self, now_s: float) -> None:
        """Begin the next iteration, if there is anything to do."""
        if not self.requests and not self.trainer.has_work:
            return
        if self._is_fast and self._may_stretch():
            self._start_stretch(now_s)
        else:
            self._start_iteration(now_s)

    def wait_s(self, now_s: float) -> float:
        """Seconds until the iteration in progress ends."""
        if self._work is None:
            return 0.0
        ends_s = self._work.ends_s
        return ends_s[min(bisect_right(ends_s, now_s), len(ends_s) - 1)] - now_s

    def kv_tokens_used(self, now_s: float) -> int:
        """Tokens of KV memory that cannot be given out, with the passes of a stretch that are over by now.

        An iteration that is over has ended before anybody can ask.
        """
        return self.requests.running.kv_used(bisect_right(self._work.ends_s, now_s) if self._work else 0)

    def _wake(self, now_s: float) -> None:
        """Something arrived: start if asleep; a stretch ends with the iteration in progress."""
        work = self._work
        if work is None:
            self.start(now_s)
        elif (kept := bisect_right(work.ends_s, now_s) + 1) < len(work.ends_s):
            del work.ends_s[kept:], work.forwards_s[kept:]
            self._begin(work)

    def _begin(self, work: _Work) -> None:
        self._work = work
        self._run += 1
        self._schedule_end(self._run, work.ends_s[-1])

    def _may_stretch(self) -> bool:
        return (
            not self.requests.prunes  # else the planner watches the blocks
            and self.requests.only_decodes
            and not self.trainer.has_work
            and self._knows_no_work
            and self.requests.running.passes_to_change() > 0
        )

    def _start_stretch(self, now_s: float) -> None:
        running, forward_s = self.requests.running, self._device.forward_s
        count = min(running.passes_to_change(), self._stretch_limit)
        shape = ForwardShape(num_decode=running.num_decode, decode_context=running.decode_context)
        overheads_s = self._device.overheads.ahead(count)
        start_s = now_s
        ends_s: list[float] = []
        forwards_s: list[float] = []
        for overhead_s, factor in zip(overheads_s, self._device.factors.ahead(count), strict=True):
            latency_s = forward_s(shape, now_s, factor)
            now_s = now_s + overhead_s + latency_s
            ends_s.append(now_s)
            forwards_s.append(latency_s)
            shape.decode_context += shape.num_decode
        self._begin(_Work(start_s, ends_s, forwards_s, overheads_s))

    def _end_stretch(self, work: _Work) -> None:
        count, running = len(work.ends_s), self.requests.running
        num_decode, context = running.num_decode, running.decode_context
        self._stretch_limit = min(2 * count + 2, _LONGEST_STRETCH)  # what arrivals cut off cost time
        for i, end_s in enumerate(work.ends_s):
            self.meter.decoded(end_s, num_decode)
            if self._is_observed():
                shape = ForwardShape(num_decode=num_decode, decode_context=context)
                self.planner.observe(IterationSample(shape, work.forwards_s[i], work.overheads_s[i]))
            context += num_decode
        self._advance(count)

    def _start_iteration(self, now_s: float) -> None:
        view = self.requests.view(now_s, self.trainer.state())
        self._knows_no_work = view.finetune is None
        plan = self.planner.plan(view)
        if pruned := self.requests.prune(plan):
            self.meter.pruned(pruned)
        fill = self.requests.fill(plan, now_s)
        for request in fill.preempted:
            self.meter.preempted(request)
        plan = self.planner.settle(plan, view, fill.shape)
        # One that came since the iteration before was planned ends the slices at once, as in the worker.
        is_wanted = self._newest_s > self._planned_s
        trained = self.trainer.run(plan, now_s, now_s if is_wanted else self.next_arrival_s)
        self._planned_s = now_s
        if not fill.shape.num_tokens and not trained.slices:
            if self.requests:
                raise MaceError(f"executor {self.index} makes no progress at {now_s} s with {plan}")
            return  # nothing is allowed to train: sleep until something arrives
        forward_s = 0.0
        if fill.shape.num_tokens:
            factor = self._device.factors.ahead(1)[0]
            forward_s = self._device.forward_s(fill.shape, now_s + trained.busy_s, factor)
        overhead_s = self._device.overheads.ahead(1)[0]
        end_s = now_s + overhead_s + forward_s + trained.busy_s
        self._begin(_Work(now_s, [end_s], [forward_s], [overhead_s], _Planned(plan, fill, trained)))

    def _end_iteration(self, work: _Work, planned: _Planned) -> None:
        [end_s], shape, trained = work.ends_s, planned.fill.shape, planned.trained
        if shape.num_tokens:
            self._end_forward(planned.fill, end_s)
        held_bytes = self.trainer.activation_bytes
        if self._is_observed():
            report = SliceReport(trained.slices, activation_bytes=held_bytes)
            self.planner.observe(
                IterationSample(shape, work.forwards_s[0], work.overheads_s[0], report, planned.plan)
            )
        if not held_bytes:
            self.planner.memory.record(Pool.ARENA, 0)
        if trained.num_pairs:
            self.planner.retrain.note_trained(trained.num_pairs)
            self.meter.trained(end_s, trained.num_pairs)

    def _end_forward(self, fill: Fill, end_s: float) -> None:
        if self.requests.running.num_decode:
            self.meter.decoded(end_s, self.requests.running.num_decode)
            self._advance(1)
        for request, tokens in fill.chunks:
            request.computed += tokens
            if not request.left:
                self.meter.prompt_done(request, end_s)
                if not self.requests.running.start_decode(request):
                    self.meter.ended(request)
        self.meter.computed(end_s, sum(tokens for _, tokens in fill.chunks))

    def _advance(self, passes: int) -> None:
        running = self.requests.running
        running.advance(passes)
        for request in running.pop_ended():
            self.meter.ended(request)

    def _is_observed(self) -> bool:
        self._iterations += 1
        return self._iterations % self._observe_every == 0
