"""A client that keeps asking while the server learns, and times what it gets.

Time to first token (TTFT) includes queueing and the HTTP stack; time between tokens (TBT) is the gap between two
streamed chunks. Failed requests are counted, never retried.
"""

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from openai import AsyncOpenAI, OpenAIError


@dataclass(slots=True)
class Timings:
    """Everything measured so far, in seconds."""

    ttft_s: list[float] = field(default_factory=list)
    tbt_s: list[float] = field(default_factory=list)
    num_requests: int = 0
    errors: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Percentiles in milliseconds; None without samples."""
        return {
            "requests": self.num_requests,
            "failed": len(self.errors),
            "errors": self.errors[:5],
            "ttft_ms": _percentiles(self.ttft_s),
            "tbt_ms": _percentiles(self.tbt_s),
        }


def _percentiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None, "max": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": round(1e3 * p50, 2), "p99": round(1e3 * p99, 2), "max": round(1e3 * max(values), 2)}


class BackgroundClient:
    """`concurrency` streams of questions, one request after the other, until the context ends."""

    def __init__(self, client: AsyncOpenAI, model: str, questions: list[str], concurrency: int = 2) -> None:
        self._client = client.with_options(max_retries=0)
        self._model = model
        self._questions = questions
        self._concurrency = concurrency
        self._tasks: list[asyncio.Task[None]] = []
        self.timings = Timings()

    async def __aenter__(self) -> "BackgroundClient":
        """Begin asking."""
        for i in range(self._concurrency):
            self._tasks.append(asyncio.create_task(self._ask_on(i)))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop; requests in flight are dropped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask_on(self, start: int) -> None:
        for question in itertools.islice(itertools.cycle(self._questions), start, None, self._concurrency):
            self.timings.num_requests += 1
            try:
                await self._ask(question)
            except OpenAIError as error:
                self.timings.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.2)

    async def _ask(self, question: str) -> None:
        sent_s = last_s = time.perf_counter()
        is_first = True
        stream = await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": question}],
            max_tokens=64,
            stream=True,
            store=False,
        )
        async for chunk in stream:
            if not chunk.choices or not chunk.choices[0].delta.content:
                continue
            now_s = time.perf_counter()
            if is_first:
                self.timings.ttft_s.append(now_s - sent_s)
                is_first = False
            else:
                self.timings.tbt_s.append(now_s - last_s)
            last_s = now_s
