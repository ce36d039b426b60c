"""Open-loop client on an engine in this process: requests are sent when the trace says so, whatever the engine does.

A closed loop (send the next request when one ends) would slow down with the engine and hide its queueing. Prompts
are random ids, so that no prefix is cached, and every request gets exactly the output length of the trace.

A run has three phases. Warm-up: a few seconds of the same load with another seed, until a fine-tune step ended. Window:
the trace's requests and what the engine reports about its iterations. Drain: requests of the window are awaited up
to a limit, with fine-tuning still going on, so that the last requests meet the same engine as the first.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness.engine_seam import MeasuredEngine
from benchmarks.harness.feeder import FineTuneFeeder
from benchmarks.harness.records import IterationLog, RequestRecord, RunRecord
from core.errors import TrainingError
from simulator.trace import TraceRequest

_LEAD_S = 0.05
"""Between the start of the clock and the first possible arrival."""


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How a run is measured."""

    window_s: float
    vocab_size: int
    """Prompts are drawn from ids 0 to here."""
    seed: int = 0
    drain_s: float = 30.0
    """How long requests are awaited after the window; what is not done then is an error."""
    poll_s: float = 0.25
    """How often the engine is asked for its iterations: seldom makes the answers long, and they are written between
    two iterations."""


class _Clock:
    """Seconds since the window began; negative before."""

    def __init__(self) -> None:
        self._origin_s = time.perf_counter() + _LEAD_S

    def __call__(self) -> float:
        return time.perf_counter() - self._origin_s

    async def sleep_until(self, moment_s: float) -> None:
        await asyncio.sleep(max(0.0, moment_s - self()))


async def run_window(
    engine: MeasuredEngine,
    requests: Sequence[TraceRequest],
    options: ClientOptions,
    feeder: FineTuneFeeder | None = None,
    warm_up: Sequence[TraceRequest] = (),
) -> RunRecord:
    """Measure one window; see the module docstring.

    Args:
        engine: what is measured.
        requests: those of the window, in order of arrival; arrivals count from its beginning.
        options: lengths and limits.
        feeder: fine-tune work; None for none. It is started and stopped here.
        warm_up: requests that are sent, awaited and forgotten before the window.

    Raises:
        TrainingError: no fine-tune step succeeds in the warm-up.
    """
    clock = _Clock()
    if feeder is not None:
        feeder.start(lambda: clock())  # the clock of the moment: the window has one of its own
    try:
        await _warm_up(engine, warm_up, options, feeder)
        if feeder is not None:
            feeder.finished.clear()
        prompts = _prompts(requests, options, tag="window")
        watch = IterationWatch(engine)
        await watch.open()
        clock = _Clock()
        watching = asyncio.create_task(watch.follow(options, clock))
        records = await _serve(engine, requests, options, clock, tag="window", prompts=prompts)
        iterations = await watching
    finally:
        if feeder is not None:
            await feeder.stop()
    tasks = [] if feeder is None else list(feeder.finished)
    return RunRecord(options.window_s, records, tasks, iterations)


async def _warm_up(
    engine: MeasuredEngine, requests: Sequence[TraceRequest], options: ClientOptions, feeder: FineTuneFeeder | None
) -> None:
    """Serve these requests, again and again until a fine-tune step has ended: some policies train only after so many.

    Raises:
        TrainingError: no step ended within ten times the drain's limit, or the first one failed.
    """
    give_up_s = time.perf_counter() + 10 * options.drain_s
    for number in itertools.count():
        await _serve(engine, requests, options, _Clock(), tag=f"warm-up-{number}")
        pause_s = 0.0 if requests else options.drain_s
        if feeder is None or await feeder.wait_for_one(pause_s):
            return
        if time.perf_counter() > give_up_s:
            raise TrainingError(f"no fine-tune step ended within {10 * options.drain_s:.0f} s")


async def _serve(
    engine: MeasuredEngine,
    requests: Sequence[TraceRequest],
    options: ClientOptions,
    clock: _Clock,
    *,
    tag: str,
    prompts: list[list[int]] | None = None,
) -> list[RequestRecord]:
    """Send each request at its time and await them all, until `drain_s` after the last moment of the window."""
    prompts = _prompts(requests, options, tag=tag) if prompts is None else prompts
    records = [
        RequestRecord(r.request_id, r.arrival_s, r.num_prompt_tokens, r.num_output_tokens) for r in requests
    ]
    sending = []
    for request, record, prompt in zip(requests, records, prompts, strict=True):
        await clock.sleep_until(request.arrival_s)
        sending.append(asyncio.create_task(_send(engine, request, record, prompt, clock, tag)))
    end_s = options.window_s if tag == "window" else max((r.arrival_s for r in requests), default=0.0)
    await clock.sleep_until(end_s)
    if sending:
        _, unfinished = await asyncio.wait(sending, timeout=max(0.0, end_s + options.drain_s - clock()))
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
    for record in records:
        if record.finished_s is None and record.error is None:
            record.error = f"not finished {options.drain_s:g} s after the window"
    return records


async def _send(
    engine: MeasuredEngine,
    request: TraceRequest,
    record: RequestRecord,
    prompt: list[int],
    clock: _Clock,
    tag: str,
) -> None:
    record.sent_s = clock()
    count, last_s = 0, 0.0
    try:
        async for ids in engine.decode(
            prompt, f"{tag}-{request.request_id}", request.num_output_tokens, priority=request.user_priority
        ):
            now_s, fresh = clock(), len(ids) - count
            if fresh <= 0:
                continue
            if count == 0:
                record.first_token_s = now_s
            else:
                record.gaps_s.append(now_s - last_s)
            record.gaps_s.extend([0.0] * (fresh - 1))
            record.num_merged_tokens += fresh - 1
            count, last_s = len(ids), now_s
    except Exception as error:  # noqa: BLE001 - a failed request is a result of the measurement
        record.error = f"{type(error).__name__}: {error}"
        return
    if count < request.num_output_tokens:
        record.error = f"ended after {count} of {request.num_output_tokens} tokens"
        return
    record.finished_s = last_s


class IterationWatch:
    """Collects the engine's iteration samples between two moments. Measures how much wall time they stand for."""

    def __init__(self, engine: MeasuredEngine) -> None:
        self._engine = engine
        self._after = 0
        self._opened_s = 0.0
        self._log = IterationLog()

    async def open(self) -> None:
        """Forget all iterations until now."""
        self._after, _ = await self._engine.iterations(0)
        self._opened_s = time.perf_counter()

    async def follow(self, options: ClientOptions, clock: _Clock) -> IterationLog:
        """Ask again and again until the window ends.

        An answer comes between two iterations, so one that is long (a blocking training phase) delays it; hence
        `covered_s` and not the window's nominal length is what the samples are to be divided by.
        """
        while clock() < options.window_s:
            await clock.sleep_until(min(clock() + options.poll_s, options.window_s))
            await self.poll()
        return self._log

    async def poll(self) -> None:
        """Take in what is new."""
        newest, samples = await self._engine.iterations(self._after)
        self._log.covered_s = time.perf_counter() - self._opened_s
        self._log.num_lost += newest - self._after - len(samples)
        self._log.samples.extend(samples)
        self._after = newest


def _prompts(requests: Sequence[TraceRequest], options: ClientOptions, *, tag: str) -> list[list[int]]:
    """Random ids for each request, drawn ahead so that the client does nothing but send."""
    rng = np.random.default_rng([options.seed, *tag.encode()])
    return [rng.integers(0, options.vocab_size, request.num_prompt_tokens).tolist() for request in requests]
