"""One run from outside: post pairs, ask, watch the counters. Times are seconds since the first phase began."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from openai import AsyncOpenAI

from benchmarks.harness.client import Clock, HttpPort, Load, Request, RequestError, RequestRecord
from benchmarks.harness.statistics import percentile
from benchmarks.studies.drift.plan import Ask, DriftPlan, asks, posts
from benchmarks.studies.drift.record import BASE, DriftError, Look, Posts, Reply, Stream
from engine.tiny.knowledge import judge

_DRAIN_S = 20.0
_MAX_TOKENS = 64
_ERRORS_KEPT = 20
_PAUSE_LOOKS = 120
_PAUSE_LOOK_S = 0.25
"""Together half a minute: a candidate's judgement and publication."""


@dataclass(frozen=True, slots=True)
class _FeedbackPort:
    """A request's prompt is the body of `POST /v1/feedback`."""

    client: httpx.AsyncClient

    async def stream(self, request: Request, record: RequestRecord) -> AsyncIterator[int]:  # noqa: ARG002
        reply = await self.client.post("/v1/feedback", json=request.prompt)
        if reply.is_error:
            raise RequestError(f"HTTP {reply.status_code}: {reply.text[:200]}")
        yield 0  # no tokens


async def play(
    client: httpx.AsyncClient, openai: AsyncOpenAI, model: str, plan: DriftPlan, seed: int
) -> tuple[tuple[Look, ...], Stream, Posts]:
    """Play all phases; returns when the last is over and its requests are answered.

    Raises:
        DriftError: fewer than half of the looks at the counters succeeded; a run with holes would be a wrong one.
    """
    clock = Clock(plan.warm_up_s + 0.1)
    chat = Load(HttpPort(openai, model, {"store": False}), clock)
    feedback = Load(_FeedbackPort(client), clock)
    asked = asks(plan, seed)
    looks, *_ = await asyncio.gather(
        _look_on(client, plan, clock),
        chat.open_loop(
            Request("ask", [{"role": "user", "content": ask.question.text}], ask.at_s, _MAX_TOKENS)
            for ask in asked
        ),
        feedback.open_loop(posts(plan, seed)),
    )
    await asyncio.gather(chat.drain(_DRAIN_S), feedback.drain(_DRAIN_S))
    lag_s = max((one.sent_s or 0.0) - one.scheduled_s for one in (*chat.records, *feedback.records))
    return looks, _stream_of(asked, chat.records), _posts_of(feedback.records, lag_s)


async def _look_on(client: httpx.AsyncClient, plan: DriftPlan, clock: Clock) -> tuple[Look, ...]:
    """Look at fixed moments; the last one is the end of the last phase."""
    looks = []
    count = round(plan.duration_s / plan.poll_s)
    for k in range(count + 1):
        await clock.sleep_until(k * plan.duration_s / count)
        try:
            reply = await client.get("/v1/training")
            looks.append(look_of(reply.raise_for_status().json(), clock()))
        except (httpx.HTTPError, KeyError):
            continue
    if len(looks) < (count + 1) / 2:
        raise DriftError(f"{count + 1 - len(looks)} looks at /v1/training failed")
    return tuple(looks)


def _stream_of(asked: Sequence[Ask], records: Sequence[RequestRecord]) -> Stream:
    """Summary of the chat requests. Those of the warm-up, and empty answers, have no times."""
    pairs = zip(asked, records, strict=True)
    counted = [(ask, one) for ask, one in pairs if ask.at_s >= 0 and one.succeeded and one.ttft_s is not None]
    replies = []
    for ask, one in counted:
        judgement = judge(ask.question, one.text)
        style = judgement.style.value if judgement.style else None
        replies.append(Reply(sent_s=ask.at_s, style=style, is_right=judgement.is_right))
    return Stream(
        num_requests=sum(ask.at_s >= 0 for ask in asked),
        errors=_errors(records),
        ttft_s=tuple(one.ttft_s for _, one in counted if one.ttft_s is not None),
        tbt_s=tuple(gap_s for _, one in counted for gap_s in one.gaps_s),
        replies=tuple(replies),
    )


def _posts_of(records: Sequence[RequestRecord], max_lag_s: float) -> Posts:
    took_s = [one.ended_s - one.sent_s for one in records if one.succeeded and one.ended_s and one.sent_s]
    return Posts(accepted=len(took_s), errors=_errors(records), p99_s=percentile(took_s, 99), max_lag_s=max_lag_s)


def _errors(records: Iterable[RequestRecord]) -> tuple[str, ...]:
    return tuple(one.error for one in records if one.error)[:_ERRORS_KEPT]


async def pause(client: httpx.AsyncClient) -> None:
    """Stop training, and wait until what was under way has ended: a candidate may still go live meanwhile.

    Raises:
        DriftError: it goes on.
    """
    await client.post("/v1/training/pause")
    for _ in range(_PAUSE_LOOKS):
        reply = await client.get("/v1/training")
        if not reply.is_error and look_of(reply.json(), 0.0).phase in ("paused", "frozen"):
            return
        await asyncio.sleep(_PAUSE_LOOK_S)
    raise DriftError("training does not pause")


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
    """Versions to be scored: by style, those that were live while it was the preferred one, and the base."""
    found: dict[str, dict[str, None]] = {style.value: {BASE: None} for style in plan.styles}
    before = BASE
    for look in looks:  # what was live before is where the phase starts
        names = found[plan.styles[plan.phase_at(look.time_s)].value]
        names[before] = names[look.version] = None
        before = look.version
    return {style: list(names) for style, names in found.items()}
