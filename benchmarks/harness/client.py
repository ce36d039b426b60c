"""One client for every measurement: it sends requests, times what comes back, and keeps one record of each.

An open loop sends each request at its own time, whatever the server does: a closed loop would slow down with the server
and hide its queueing. A closed loop keeps so many requests under way, for questions of capacity. What is asked is the
business of a port: `EnginePort` drives an engine in this process, `HttpPort` an OpenAI-compatible server.

Times are seconds on the clock of the load. A request that fails is a result: its record says why, nothing is repeated.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from openai import AsyncOpenAI

from core.batch import IterationSample
from core.errors import MaceError
from core.types import FineTuneTask, TaskResult


class RequestError(MaceError):
    """A stream ended before its answer was complete."""


class Clock:
    """Seconds of `time.monotonic` since an origin `lead_s` from now; negative before it."""

    def __init__(self, lead_s: float = 0.0) -> None:
        self._origin_s = time.monotonic() + lead_s

    def __call__(self) -> float:
        """Return the time now."""
        return time.monotonic() - self._origin_s

    async def sleep_until(self, moment_s: float) -> None:
        """Return at once if the moment is over."""
        await asyncio.sleep(max(0.0, moment_s - self()))


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as a port is asked for it."""

    request_id: str
    prompt: Any
    """Token ids for an engine, chat messages for a server."""
    arrival_s: float = 0.0
    """When it arrives, on the clock of the load. A closed loop sends it when its turn comes."""
    max_tokens: int = 64
    priority: int = 0


@dataclass(slots=True)
class RequestRecord:
    """One request, as the client saw it."""

    request_id: str
    scheduled_s: float
    """When it should have been sent; TTFT counts from here, however late it was sent."""
    sent_s: float | None = None
    first_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    """Times between tokens. Of k tokens that came in one output the first has the whole gap, the others 0."""
    num_merged_tokens: int = 0
    """Tokens that came in one output with an earlier one."""
    ended_s: float | None = None
    """When its last token came, or when it failed."""
    error: str | None = None
    """Set exactly if the request did not end with all its tokens."""
    text: str = ""
    """The answer, from ports that speak text."""

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, queueing and lateness of the client included."""
        return None if self.first_token_s is None else self.first_token_s - self.scheduled_s

    @property
    def num_tokens(self) -> int:
        """Tokens that came."""
        return 0 if self.first_token_s is None else 1 + len(self.gaps_s)

    @property
    def succeeded(self) -> bool:
        """True if the whole answer came."""
        return self.ended_s is not None and self.error is None

    def add_tokens(self, count: int, now_s: float) -> None:
        """Note an output of `count` > 0 tokens."""
        if self.first_token_s is None:
            self.first_token_s = now_s
        else:
            self.gaps_s.append(now_s - (self.ended_s or self.first_token_s))
        self.gaps_s.extend([0.0] * (count - 1))
        self.num_merged_tokens += count - 1
        self.ended_s = now_s


class Port(Protocol):
    """A destination of requests."""

    def stream(self, request: Request, record: RequestRecord) -> AsyncIterator[int]:
        """Ask; yield the number of new tokens of each output; raise what went wrong. It may fill `record.text`."""
        ...


class Load:
    """Requests under way on one port, and the records of all. Call `drain` at the end."""

    def __init__(self, port: Port, clock: Callable[[], float] | None = None) -> None:
        self._port = port
        self._clock = Clock() if clock is None else clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopped = False
        self.records: list[RequestRecord] = []
        """In the order of sending, of `send`, `open_loop` and `closed_loop`."""

    async def open_loop(self, requests: Iterable[Request]) -> None:
        """Send each request at its arrival, however many are unanswered; return when the last one is sent."""
        for request in requests:
            await asyncio.sleep(max(0.0, request.arrival_s - self._clock()))
            if self._is_stopped:
                return
            self.send(request, request.arrival_s)

    async def closed_loop(self, requests: Iterator[Request], num_workers: int) -> None:
        """Keep so many requests under way until the requests end or `stop`; return when the last one has ended.

        If this is cancelled, requests under way go on, as in an open loop.
        """

        async def work() -> None:
            while not self._is_stopped and (request := next(requests, None)) is not None:
                await asyncio.wait([self.send(request)])

        await asyncio.gather(*(work() for _ in range(num_workers)))

    def send(self, request: Request, scheduled_s: float | None = None) -> asyncio.Task[None]:
        """Send one request now; its task ends when the answer has, and never fails."""
        record = RequestRecord(request.request_id, self._clock() if scheduled_s is None else scheduled_s)
        self.records.append(record)
        task = asyncio.create_task(self._run(request, record))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def ask(self, request: Request) -> RequestRecord:
        """Send one request and await its end. Its record is returned and not kept."""
        record = RequestRecord(request.request_id, self._clock())
        await self._run(request, record)
        return record

    def stop(self) -> None:
        """Begin no further request; those under way go on."""
        self._is_stopped = True

    async def drain(self, limit_s: float) -> int:
        """Await what is under way. What does not end in time is cancelled and has failed; return how many did."""
        self.stop()
        if not self._tasks:
            return 0
        _, late = await asyncio.wait(self._tasks, timeout=max(0.0, limit_s))
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return len(late)

    async def _run(self, request: Request, record: RequestRecord) -> None:
        record.sent_s = self._clock()
        try:
            async for count in self._port.stream(request, record):
                if count > 0:
                    record.add_tokens(count, self._clock())
        except asyncio.CancelledError:
            record.error = "not finished at the end of the run"
            raise
        except Exception as error:  # noqa: BLE001 - a failed request is a result of the measurement
            record.error = f"{type(error).__name__}: {error}"[:300]
        finally:
            if record.error is not None or record.ended_s is None:
                record.ended_s = self._clock()


class MeasuredEngine(Protocol):
    """The part of an engine that measurements need; `engine.vllm.engine.HybridEngine` is the real one."""

    def decode(
        self, prompt_ids: Sequence[int], request_id: str, max_tokens: int, handle: Any = None, priority: int = 0
    ) -> AsyncIterator[list[int]]:
        """Token ids so far, after each output; always `max_tokens` in the end."""
        ...

    async def run_task(self, task: FineTuneTask) -> TaskResult:
        """Run a fine-tune task to its end; cancelling aborts it."""
        ...

    async def iterations(self, after: int) -> tuple[int, list[IterationSample]]:
        """The newest sequence number, and the samples after `after` that are still known."""
        ...


@dataclass(frozen=True, slots=True)
class EnginePort:
    """Requests of token ids to an engine in this process; exactly `max_tokens` come, or it is an error."""

    engine: MeasuredEngine

    async def stream(self, request: Request, record: RequestRecord) -> AsyncIterator[int]:  # noqa: ARG002
        """See `Port.stream`."""
        count = 0
        async for ids in self.engine.decode(
            request.prompt, request.request_id, request.max_tokens, priority=request.priority
        ):
            fresh, count = len(ids) - count, len(ids)
            yield fresh
        if count < request.max_tokens:
            raise RequestError(f"ended after {count} of {request.max_tokens} tokens")


@dataclass(frozen=True, slots=True)
class HttpPort:
    """Streamed chat with an OpenAI-compatible server. A chunk of text counts as one token."""

    client: AsyncOpenAI
    """Give it `max_retries=0`: a repeated request would hide a failure."""
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the call, such as `store=False`."""

    async def stream(self, request: Request, record: RequestRecord) -> AsyncIterator[int]:
        """See `Port.stream`."""
        finish: str | None = None
        chunks = await self.client.chat.completions.create(
            model=self.model,
            messages=request.prompt,
            max_tokens=request.max_tokens,
            stream=True,
            **self.options,
        )
        async for chunk in chunks:
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                if text := choice.delta.content:
                    record.text += text
                    yield 1
        if finish is None:
            raise RequestError("the stream ended without a finish_reason")
