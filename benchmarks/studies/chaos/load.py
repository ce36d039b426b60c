"""Load on the server while it is being killed: streamed chat, never repeated, and feedback, repeated until thanked for.

Times are seconds of `time.monotonic()`.
"""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import APIError, AsyncOpenAI

from benchmarks.studies.chaos.ledger import Ledger
from engine.tiny.knowledge import held_out_questions

CHAT_TIMEOUT_S = 150.0
STALL_S = 10.0
"""An answer that takes longer came too late for a person, though it came."""
_FEEDBACK_TIMEOUT_S = 10.0
_REPEAT_PAUSE_S = 0.3
_MAX_TOKENS = 48
_READ_ATTEMPTS = 15
_REFUSALS = (400, 413, 422)
"""The record is wrong and stays so. Other answers pass: Serve's proxy says 404 until it knows of the application."""
_LIST_EVERY = 8
"""Every so many posts one is a list of three records."""


@dataclass(slots=True)
class ChatRequest:
    """One request and what became of it."""

    sent_s: float
    ended_s: float | None = None
    error: str | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the whole answer came."""
        return self.ended_s is not None and self.error is None


@dataclass(slots=True)
class ChatLoad:
    """Open loop: a request every 1/`rate_per_s` seconds, however long the others take."""

    client: AsyncOpenAI
    model: str
    rate_per_s: float
    rng: random.Random
    requests: list[ChatRequest] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        """Send until cancelled; requests in flight go on."""
        started_s = time.monotonic()
        number = 0
        while True:
            number += 1
            await asyncio.sleep(max(0.0, started_s + number / self.rate_per_s - time.monotonic()))
            self.send()

    def send(self) -> None:
        """One request now."""
        task = asyncio.get_running_loop().create_task(self._ask())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, limit_s: float) -> None:
        """Await what is in flight; what does not end in time has failed."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=limit_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask_once(self) -> ChatRequest:
        """A request of the director, outside the statistics."""
        request = ChatRequest(time.monotonic())
        await self._stream(request)
        return request

    async def _ask(self) -> None:
        request = ChatRequest(time.monotonic())
        self.requests.append(request)
        await self._stream(request)

    async def _stream(self, request: ChatRequest) -> None:
        question = self.rng.choice(held_out_questions()).text
        finish: str | None = None
        try:
            stream = await self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": question}],
                max_tokens=_MAX_TOKENS,
                stream=True,
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    finish = choice.finish_reason or finish
            if finish is None:
                request.error = "the stream ended without a finish_reason"
        except (APIError, httpx.HTTPError) as error:
            request.error = f"{type(error).__name__}: {error}"[:200]
        except asyncio.CancelledError:
            request.error = "not finished at the end of the run"
            raise
        finally:
            request.ended_s = time.monotonic()


class FeedbackLoad:
    """Writers that post one record (or a list) and repeat it, under the same id, until it is acknowledged."""

    def __init__(self, client: httpx.AsyncClient, bodies: Iterator[dict[str, Any]], interval_s: float) -> None:
        self._client = client
        self._bodies = bodies
        self._interval_s = interval_s
        self._posts = 0
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.ledger = Ledger()
        self.last_acknowledged_s = 0.0

    def start(self, num_writers: int = 3) -> None:
        """Begin to post; `drain` ends it."""
        for number in range(num_writers):
            task = asyncio.get_running_loop().create_task(
                self._write_on(number * self._interval_s, num_writers * self._interval_s)
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def send(self) -> None:
        """One post now, beside the writers."""
        task = asyncio.get_running_loop().create_task(self.post_next())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, limit_s: float) -> None:
        """Begin no further record and await what is being repeated; what is not acknowledged in time stays in doubt."""
        self._stopping = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=limit_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def post_next(self) -> None:
        """One record, or now and then three, until acknowledged."""
        self._posts += 1
        count = 3 if self._posts % _LIST_EVERY == 0 else 1
        bodies = [next(self._bodies) for _ in range(count)]
        self.ledger.sent |= {body["id"]: body for body in bodies}
        sent = False
        while bodies:
            if sent:
                self.ledger.repeats += 1
                await asyncio.sleep(_REPEAT_PAUSE_S)
            sent = True
            bodies = await self._post(bodies)

    async def _write_on(self, delay_s: float, pause_s: float) -> None:
        await asyncio.sleep(delay_s)
        while not self._stopping:
            await self.post_next()
            await asyncio.sleep(pause_s)

    async def _post(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns what was not acknowledged."""
        content = bodies[0] if len(bodies) == 1 else {"items": bodies}
        try:
            reply = await self._client.post("/v1/feedback", json=content, timeout=_FEEDBACK_TIMEOUT_S)
        except httpx.HTTPError as error:
            self.ledger.answers[type(error).__name__] += 1
            return bodies
        self.ledger.answers[str(reply.status_code)] += 1
        if reply.status_code in _REFUSALS:
            self.ledger.refused |= {body["id"]: reply.text[:200] for body in bodies}
            return []
        if reply.status_code != 202:
            return bodies
        rows = reply.json().get("data", [reply.json()])
        accepted = {row["id"] for row in rows if row["status"] in ("accepted", "duplicate")}
        self.ledger.acknowledged |= accepted
        self.last_acknowledged_s = time.monotonic()
        return [body for body in bodies if body["id"] not in accepted]


async def read_all_feedback(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """Every entry of `GET /v1/feedback`, page by page."""
    entries: list[dict[str, Any]] = []
    while True:
        parameters: dict[str, Any] = {"limit": 1000, **({"after": entries[-1]["id"]} if entries else {})}
        page = (await _get(client, "/v1/feedback", parameters)).json()
        entries += page["data"]
        if not page["has_more"]:
            return entries


async def export_all_pairs(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """Every row of the export."""
    reply = await _get(client, "/v1/feedback/export", {"format": "trl"})
    return [json.loads(line) for line in reply.text.splitlines()]


async def _get(client: httpx.AsyncClient, path: str, parameters: dict[str, Any]) -> httpx.Response:
    """The last kill may be felt for a while, so a failure is repeated; the last one is raised."""
    for _ in range(_READ_ATTEMPTS):
        try:
            return (await client.get(path, params=parameters, timeout=120)).raise_for_status()
        except httpx.HTTPError:
            await asyncio.sleep(2.0)
    return (await client.get(path, params=parameters, timeout=120)).raise_for_status()
