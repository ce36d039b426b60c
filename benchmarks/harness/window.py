"""One measuring window on an engine in this process: requests of a trace, fine-tuning, and the engine's iterations.

A window has three phases. Warm-up: a few seconds of the same load with another seed, until a fine-tune step has ended.
Window: the trace's requests, and what the engine reports about its iterations. Drain: requests of the window are
awaited up to a limit, with fine-tuning still going on, so that the last requests meet the same engine as the first.

Prompts are random ids, so that no prefix is cached, and every request gets exactly the output length of the trace.
"""

import asyncio
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.harness.client import Clock, EnginePort, Load, MeasuredEngine, Request, RequestRecord
from benchmarks.harness.energy import EnergyWatch
from benchmarks.harness.feeder import FineTuneFeeder, TaskRecord
from core.batch import IterationSample
from core.errors import TrainingError
from simulator.trace import TraceRequest

_LEAD_S = 0.05
"""Time between the start of the clock and the first possible arrival."""


@dataclass(frozen=True, slots=True)
class WindowOptions:
    """How a window is measured."""

    window_s: float
    vocab_size: int
    """Prompts are drawn from ids 0 to here."""
    seed: int = 0
    drain_s: float = 30.0
    """How long requests are awaited after the window; what is not done then is an error."""
    poll_s: float = 0.25
    """How often the engine is asked for its iterations: seldom makes the answers long, and they are written between
    two iterations."""


@dataclass(slots=True)
class WindowRecord:
    """Everything seen in one window, before any statistics. Times are seconds since it began."""

    window_s: float
    requests: list[RequestRecord] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)
    samples: list[IterationSample] = field(default_factory=list)
    """The engine's iterations."""
    covered_s: float = 0.0
    """Wall time that the samples stand for: between the engine's answers that open and close the window. An answer
    comes between two iterations, so a long one (a blocking training phase) delays it; sums over samples are to be
    divided by this, not by the nominal length of the window."""
    num_lost: int = 0
    """Iterations that the engine had forgotten when it was asked."""
    energy: EnergyWatch | None = None
    """None: nobody watched."""


async def run_window(
    engine: MeasuredEngine,
    requests: Sequence[TraceRequest],
    options: WindowOptions,
    feeder: FineTuneFeeder | None = None,
    warm_up: Sequence[TraceRequest] = (),
    energy: EnergyWatch | None = None,
) -> WindowRecord:
    """Measure one window; see the module docstring.

    Args:
        engine: the one that is measured.
        requests: those of the window, in order of arrival; arrivals count from its beginning.
        options: lengths and limits.
        feeder: fine-tune work, if there is any. It is started and stopped here.
        warm_up: requests that are sent, awaited and forgotten before the window.
        energy: what watches the sensors. If there are any, the engine idles for some seconds first.

    Raises:
        TrainingError: no fine-tune step succeeds in the warm-up.
    """
    # Drawn ahead, so that the client does nothing but send.
    prompts = list(with_prompts(requests, options.vocab_size, options.seed, "window"))
    record = WindowRecord(options.window_s, energy=energy)
    if energy is not None:
        await asyncio.to_thread(energy.idle)
    if feeder is not None:
        feeder.start()
    try:
        await _warm_up(engine, warm_up, options, feeder)
        last_seen, _ = await engine.iterations(0)
        clock = Clock(_LEAD_S)
        if feeder is not None:
            feeder.restart(clock)
        watching = asyncio.create_task(_watch(engine, record, last_seen, options.poll_s, clock))
        record.requests = await _serve(engine, prompts, options.window_s, options.drain_s, clock)
        await watching
    finally:
        if feeder is not None:
            await feeder.stop()
    if feeder is not None:
        record.tasks = list(feeder.finished)
    return record


async def _warm_up(
    engine: MeasuredEngine, requests: Sequence[TraceRequest], options: WindowOptions, feeder: FineTuneFeeder | None
) -> None:
    """Serve these requests, again and again until a fine-tune step has ended: some policies train only after so many.

    Raises:
        TrainingError: no step ended within ten times the drain's limit, or the first one failed.
    """
    end_s = max((request.arrival_s for request in requests), default=0.0)
    give_up_s = time.monotonic() + 10 * options.drain_s
    for number in itertools.count():
        prompts = list(with_prompts(requests, options.vocab_size, options.seed, f"warm-up-{number}"))
        await _serve(engine, prompts, end_s, options.drain_s, Clock(_LEAD_S))
        if feeder is None or await feeder.wait_for_one(0.0 if requests else options.drain_s):
            return
        if time.monotonic() > give_up_s:
            raise TrainingError(f"no fine-tune step ended within {10 * options.drain_s:.0f} s")


async def _serve(
    engine: MeasuredEngine, requests: Sequence[Request], end_s: float, drain_s: float, clock: Clock
) -> list[RequestRecord]:
    """Send each request at its time and await them all, until `drain_s` after `end_s`."""
    load = Load(EnginePort(engine), clock)
    await load.open_loop(requests)
    await clock.sleep_until(end_s)
    await load.drain(end_s + drain_s - clock())
    return load.records


async def _watch(
    engine: MeasuredEngine, record: WindowRecord, last_seen: int, poll_s: float, clock: Clock
) -> None:
    """Collect the engine's iterations from now to the end of the window."""
    opened_s = clock()
    if record.energy is not None:
        record.energy.skip()
    while clock() < record.window_s:
        await clock.sleep_until(min(clock() + poll_s, record.window_s))
        newest, samples = await engine.iterations(last_seen)
        record.covered_s = clock() - opened_s
        record.num_lost += newest - last_seen - len(samples)
        record.samples.extend(samples)
        if record.energy is not None:
            forward_s = sum(sample.forward_s for sample in samples if sample.shape.num_tokens)
            record.energy.add(forward_s, sum(sample.slices_s for sample in samples))
        last_seen = newest


def with_prompts(requests: Iterable[TraceRequest], vocabulary: int, seed: int, tag: str) -> Iterator[Request]:
    """Give each request of a trace a prompt of random ids; `tag` makes ids unique in the life of an engine."""
    rng = np.random.default_rng([seed, *tag.encode()])
    for one in requests:
        prompt = rng.integers(0, vocabulary, one.num_prompt_tokens).tolist()
        yield Request(f"{tag}-{one.request_id}", prompt, one.arrival_s, one.num_output_tokens, one.user_priority)
