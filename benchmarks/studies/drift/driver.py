"""One run from outside: post pairs, ask, watch the counters, then score the versions that were live."""

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from benchmarks.studies.drift.plan import Ask, DriftPlan, Post, asks, posts
from benchmarks.studies.drift.record import BASE, Look, Posts, Reply, Stream
from core.errors import MaceError
from engine.tiny.knowledge import judge

_DRAIN_S = 20.0
_MAX_TOKENS = 64
_ERRORS_KEPT = 20
_PAUSE_LOOK_S = 0.25
_PAUSE_LOOKS = 120
"""Half a minute: a candidate's judgement and publication."""


class DriverError(MaceError):
    """The run cannot be measured; a run with holes would be a wrong one."""


class Clock:
    """Seconds since the first phase began; negative before."""

    def __init__(self, lead_s: float) -> None:
        self._origin_s = time.perf_counter() + lead_s

    def __call__(self) -> float:
        """The time now."""
        return time.perf_counter() - self._origin_s

    async def sleep_until(self, moment_s: float) -> None:
        """Return at once if that is over."""
        await asyncio.sleep(max(0.0, moment_s - self()))


@dataclass(slots=True)
class _Seen:
    looks: list[Look] = field(default_factory=list)
    missed_looks: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tbt_s: list[float] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    ask_errors: list[str] = field(default_factory=list)
    post_s: list[float] = field(default_factory=list)
    post_errors: list[str] = field(default_factory=list)
    max_lag_s: float = 0.0


class Driver:
    """Plays one plan against one server. Call `play` once."""

    def __init__(self, client: httpx.AsyncClient, model: str, plan: DriftPlan, seed: int) -> None:
        self._client = client
        self._model = model
        self._plan = plan
        self._posts = posts(plan, seed)
        self._asks = asks(plan, seed)
        self._seen = _Seen()

    async def play(self) -> None:
        """All phases; returns when the last is over and its requests are answered.

        Raises:
            DriverError: fewer than half of the looks at the counters succeeded.
        """
        clock = Clock(self._plan.warm_up_s + 0.1)
        looking = asyncio.create_task(self._look_on(clock))
        sent = await asyncio.gather(
            self._send(clock, self._posts, self._post), self._send(clock, self._asks, self._ask)
        )
        await looking
        pending = [task for tasks in sent for task in tasks if not task.done()]
        if pending:
            _, late = await asyncio.wait(pending, timeout=_DRAIN_S)
            for task in late:
                task.cancel()
            self._seen.ask_errors += ["no answer in time"] * len(late)
        if self._seen.missed_looks > len(self._seen.looks):
            raise DriverError(f"{self._seen.missed_looks} looks at /v1/training failed")

    @property
    def looks(self) -> tuple[Look, ...]:
        """What the counters said."""
        return tuple(self._seen.looks)

    @property
    def stream(self) -> Stream:
        """What the requests measured."""
        seen = self._seen
        return Stream(
            num_requests=sum(ask.at_s >= 0 for ask in self._asks),
            errors=tuple(seen.ask_errors[:_ERRORS_KEPT]),
            ttft_s=tuple(seen.ttft_s),
            tbt_s=tuple(seen.tbt_s),
            replies=tuple(seen.replies),
        )

    @property
    def posts(self) -> Posts:
        """What became of the pairs."""
        seen = self._seen
        return Posts(
            accepted=len(seen.post_s),
            errors=tuple(seen.post_errors[:_ERRORS_KEPT]),
            p99_s=float(np.percentile(seen.post_s, 99)) if seen.post_s else None,
            max_lag_s=seen.max_lag_s,
        )

    async def _send(self, clock: Clock, items: Iterable[Any], send: Any) -> list[asyncio.Task[None]]:
        """Open loop: each when it is due, however many are unanswered."""
        tasks: list[asyncio.Task[None]] = []
        for item in items:
            await clock.sleep_until(item.at_s)
            self._seen.max_lag_s = max(self._seen.max_lag_s, clock() - item.at_s)
            tasks.append(asyncio.create_task(send(clock, item)))
        return tasks

    async def _post(self, clock: Clock, post: Post) -> None:
        sent_s = clock()
        try:
            reply = await self._client.post("/v1/feedback", json=post.body)
        except httpx.TransportError as error:
            self._seen.post_errors.append(f"{type(error).__name__}: {error}")
            return
        if reply.is_error:
            self._seen.post_errors.append(f"HTTP {reply.status_code}: {reply.text[:200]}")
        else:
            self._seen.post_s.append(clock() - sent_s)

    async def _ask(self, clock: Clock, ask: Ask) -> None:
        arrivals_s: list[float] = []
        parts: list[str] = []
        try:
            async for text in self._stream(ask):
                parts.append(text)
                arrivals_s.append(clock())
        except (httpx.TransportError, DriverError) as error:
            self._seen.ask_errors.append(f"{type(error).__name__}: {error}")
            return
        if ask.at_s < 0 or not arrivals_s:  # warm-up, or an empty answer, which has no time to a first token
            return
        judgement = judge(ask.question, "".join(parts))
        style = judgement.style.value if judgement.style else None
        self._seen.ttft_s.append(arrivals_s[0] - ask.at_s)
        self._seen.tbt_s += np.diff(arrivals_s).tolist()
        self._seen.replies.append(Reply(sent_s=ask.at_s, style=style, is_right=judgement.is_right))

    async def _stream(self, ask: Ask) -> Any:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": ask.question.text}],
            "max_tokens": _MAX_TOKENS,
            "stream": True,
            "store": False,
        }
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.is_error:
                raise DriverError(f"HTTP {reply.status_code}: {(await reply.aread())[:200]!r}")
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: ")).get("choices")
                    if choices and (text := choices[0]["delta"].get("content")):
                        yield text

    async def _look_on(self, clock: Clock) -> None:
        """At fixed moments; the last one is the end of the last phase."""
        count = round(self._plan.duration_s / self._plan.poll_s)
        for k in range(count + 1):
            await clock.sleep_until(k * self._plan.duration_s / count)
            try:
                reply = await self._client.get("/v1/training")
                reply.raise_for_status()
                self._seen.looks.append(look_of(reply.json(), clock()))
            except (httpx.HTTPError, KeyError):
                self._seen.missed_looks += 1


async def pause(client: httpx.AsyncClient) -> None:
    """Stop training, and wait until what was under way has ended: a candidate may still go live meanwhile.

    Raises:
        DriverError: it goes on.
    """
    await client.post("/v1/training/pause")
    for _ in range(_PAUSE_LOOKS):
        reply = await client.get("/v1/training")
        if not reply.is_error and look_of(reply.json(), 0.0).phase in ("paused", "frozen"):
            return
        await asyncio.sleep(_PAUSE_LOOK_S)
    raise DriverError("training does not pause")


def look_of(training: dict[str, Any], time_s: float) -> Look:
    """Read the reply of `GET /v1/training`."""
    executor = training["executor"]
    drift = training.get("drift") or {}
    return Look(
        time_s=time_s,
        version=executor["live_version"],
        steps=executor.get("steps", 0),  # a server that does not learn has no counters
        pairs=executor.get("pairs", 0),
        phase=executor.get("phase", "frozen"),
        decision=executor.get("last_decision"),
        queued_pairs=(training.get("queue") or {}).get("queued_pairs"),
        retrain_rate=drift.get("retrain_rate"),
        gamma=drift.get("gamma"),
        level=drift.get("level"),
    )


def versions_by_style(plan: DriftPlan, looks: Iterable[Look]) -> dict[str, list[str]]:
    """What has to be scored: by style, the versions that were live while it was the preferred one, and the base."""
    found: dict[str, dict[str, None]] = {style.value: {BASE: None} for style in plan.styles}
    before = BASE
    for look in looks:  # what was live before is where the phase starts
        names = found[plan.styles[plan.phase_at(look.time_s)].value]
        names[before] = names[look.version] = None
        before = look.version
    return {style: list(names) for style, names in found.items()}
