"""One executor of a simulation: the production planner in virtual time.

An iteration is: view, plan, fill as vLLM fills, settle, slices as far as admitted, forward pass; it lasts overhead +
slices + forward pass, and its tokens are out at its end.

While requests only decode, none waits and there is nothing to train, the planner decides nothing: then iterations are
simulated in a *stretch*, without views and plans, until a request ends or one arrives. Each iteration of a stretch has
its own latency, noise and sample, so the outcome is the same to the last bit.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from core.batch import ForwardShape, IterationSample, Plan
from core.errors import MaceError
from core.types import SliceReport
from scheduler.iteration.planner import IterationPlanner
from scheduler.memory.ledger import Pool
from simulator.device import Device
from simulator.requests import Fill, RequestPool
from simulator.running import SimRequest
from simulator.statistics import Statistics, TokenMeter
from simulator.trainer import Trained, Trainer

_FIRST_STRETCH = 8
_LONGEST_STRETCH = 64
"""Iterations; a longer one would too often be thrown away by an arrival."""


@dataclass(slots=True)
class _Iteration:
    """An iteration that the planner has planned."""

    start_s: float
    end_s: float
    plan: Plan
    fill: Fill
    overhead_s: float
    forward_s: float
    trained: Trained


@dataclass(slots=True)
class _Stretch:
    """Iterations of the same decoding requests, one after the other."""

    start_s: float
    ends_s: list[float]
    forwards_s: list[float]
    overheads_s: list[float]
    context: int
    """Cached tokens before the first."""


class SimulatedExecutor:
    """See the module docstring. `schedule_end(run, end_s)` is told when the work in progress ends."""

    def __init__(
        self,
        index: int,
        *,
        planner: IterationPlanner,
        device: Device,
        trainer: Trainer,
        requests: RequestPool,
        meter: TokenMeter,
        statistics: Statistics,
        schedule_end: Callable[[int, float], None],
        observe_every: int = 1,
        is_fast: bool = True,
    ) -> None:
        self.index = index
        self.trainer = trainer
        self.requests = requests
        self.meter = meter
        self.planner = planner
        self._device = device
        self._statistics = statistics
        self._schedule_end = schedule_end
        self._observe_every = observe_every
        self._is_fast = is_fast
        self._run = 0
        self._current: _Iteration | _Stretch | None = None
        self._stretch_limit = _FIRST_STRETCH
        self._knows_no_work = False
        """The planner was told in its last view that there is nothing to train: its blocking phases end there."""
        self._iterations = 0

    def submit(self, request: SimRequest, now_s: float) -> None:
        """Take in a request.

        Raises:
            ConfigError: it can never fit the KV cache.
        """
        self.requests.running.check(request)
        self.planner.retrain.note_requests()
        self.requests.enqueue(request)
        self._wake(now_s)

    def add_task(self, now_s: float) -> None:
        """Take in fine-tune work."""
        self.trainer.add_task(now_s)
        self._wake(now_s)

    def end(self, run: int, now_s: float) -> None:
        """End work number `run`; nothing happens if it was cut short meanwhile."""
        if run != self._run:
            return
        if isinstance(self._current, _Stretch):
            self._end_stretch(self._current)
        elif self._current is not None:
            self._end_iteration(self._current)
        self._current = None
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
        current = self._current
        if current is None:
            return 0.0
        if isinstance(current, _Iteration):
            return current.end_s - now_s
        return current.ends_s[min(bisect_right(current.ends_s, now_s), len(current.ends_s) - 1)] - now_s

    def kv_tokens_used(self, now_s: float) -> int:
        """Tokens of KV memory that cannot be given out, with the passes of a stretch that are over by now."""
        over = bisect_right(self._current.ends_s, now_s) if isinstance(self._current, _Stretch) else 0
        return self.requests.running.kv_used(over)

    def _wake(self, now_s: float) -> None:
        """Something arrived: start if asleep; a stretch ends with the iteration in progress."""
        current = self._current
        if current is None:
            self.start(now_s)
        elif isinstance(current, _Stretch):
            kept = bisect_right(current.ends_s, now_s) + 1
            if kept < len(current.ends_s):
                del current.ends_s[kept:], current.forwards_s[kept:]
                self._begin(current, current.ends_s[-1])

    def _begin(self, work: _Iteration | _Stretch, end_s: float) -> None:
        self._current = work
        self._run += 1
        self._schedule_end(self._run, end_s)

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
        self._begin(_Stretch(start_s, ends_s, forwards_s, overheads_s, running.decode_context), now_s)

    def _end_stretch(self, stretch: _Stretch) -> None:
        count = len(stretch.ends_s)
        num_decode, context = self.requests.running.num_decode, stretch.context
        self._stretch_limit = min(2 * count + 2, _LONGEST_STRETCH)  # what arrivals cut off cost time
        self._device.take(count)
        for i, end_s in enumerate(stretch.ends_s):
            self.meter.decoded(end_s, num_decode)
            if self._is_observed():
                shape = ForwardShape(num_decode=num_decode, decode_context=context)
                self.planner.observe(IterationSample(shape, stretch.forwards_s[i], stretch.overheads_s[i]))
            context += num_decode
        self._statistics.iterations += count
        self._statistics.add_work(stretch.start_s, stretch.ends_s[-1], sum(stretch.forwards_s), 0.0)
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
        trained = self.trainer.run(plan, now_s)
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
        self._begin(_Iteration(now_s, end_s, plan, fill, overhead_s, forward_s, trained), end_s)

    def _end_iteration(self, iteration: _Iteration) -> None:
        trained = iteration.trained
        self._statistics.iterations += 1
        self._statistics.slices += len(trained.slices)
        self._statistics.add_work(iteration.start_s, iteration.end_s, iteration.forward_s, trained.busy_s)
        self._device.take(1)
        if iteration.fill.shape.num_tokens:
            self._end_forward(iteration)
        if self._is_observed():
            self.planner.observe(self._sample(iteration))
        if not self.trainer.activation_bytes:
            self.planner.memory.record(Pool.ARENA, 0)
        if trained.num_pairs:
            self.planner.retrain.note_trained(trained.num_pairs)
            self.meter.trained(iteration.end_s, trained.num_pairs)

    def _end_forward(self, iteration: _Iteration) -> None:
        if self.requests.running.num_decode:
            self.meter.decoded(iteration.end_s, self.requests.running.num_decode)
            self._advance(1)
        num_tokens = 0
        for request, tokens in iteration.fill.chunks:
            request.computed += tokens
            num_tokens += tokens
            if not request.left:
                self.meter.prompt_done(request, iteration.end_s)
                if not self.requests.running.start_decode(request):
                    self.meter.ended(request)
        self.meter.computed(iteration.end_s, num_tokens)

    def _advance(self, passes: int) -> None:
        running = self.requests.running
        running.advance(passes)
        for request in running.pop_ended():
            self.meter.ended(request)

    def _sample(self, iteration: _Iteration) -> IterationSample:
        return IterationSample(
            iteration.fill.shape,
            iteration.forward_s,
            iteration.overhead_s,
            SliceReport(iteration.trained.slices, activation_bytes=self.trainer.activation_bytes),
            iteration.plan,
        )

    def _is_observed(self) -> bool:
        self._iterations += 1
        return self._iterations % self._observe_every == 0
