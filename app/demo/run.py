"""The demo's course: survey, prefer one style, wait, survey, prefer another, wait, survey.

A background client keeps asking meanwhile and times what it gets. Time to first token (TTFT) includes queueing and the
HTTP stack; time between tokens (TBT) is the gap between two streamed chunks. Failed requests are counted, never
retried.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from openai import AsyncOpenAI, OpenAIError

from app.demo.taste import Survey, make_preferences, post_preferences, survey
from engine.tiny.knowledge import Question, Style, held_out_questions, preference_questions

_QUIET_S = 3.0
"""Learning is over when nothing was queued or running for this long."""
_POLL_S = 0.5
_TIMED_S = 5.0
"""Time that the server is timed for before it learns."""
_STREAMS = 2
"""Questions of the background client that are asked at a time."""

Say = Callable[[str], None]


class DemoError(RuntimeError):
    """The server does not serve the tiny built-in model, or did not finish learning in time."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The demo's questions, styles and waiting times."""

    base_url: str
    first: Style
    second: Style
    preferences: int = 60
    questions: int = 60
    samples: int = 8
    timeout_s: float = 300.0
    api_key: str = "none"


@dataclass(slots=True)
class Timings:
    """Everything that the background client measured so far, in seconds."""

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


async def run_demo(options: DemoOptions, say: Say) -> dict[str, Any]:
    """Run it all; returns the report that `--json` prints.

    Raises:
        openai.OpenAIError: the server is not there or refuses.
        DemoError: it does not serve the tiny built-in model, or is still learning after `DemoOptions.timeout_s`.
    """
    async with AsyncOpenAI(base_url=f"{options.base_url}/v1", api_key=options.api_key, max_retries=0) as client:
        card = (await client.models.list()).data[0]
        model, root = card.id, getattr(card, "root", "")
        if not str(root).startswith("tiny-assistant"):
            raise DemoError(
                f"the demo judges the answers of the tiny built-in model, but {model} is {root}; "
                "start `mace serve serve_config.tiny.yaml`"
            )
        asked = held_out_questions()[: options.questions]
        say(f"{model}: asking {len(asked)} held-out questions, {options.samples} times each")
        before = await survey(client, model, asked, options.samples)
        async with _background_client(client, model, asked) as idle:
            await asyncio.sleep(_TIMED_S)
        phases: list[dict[str, Any]] = []
        for style in (options.first, options.second):
            phases.append(await _teach(client, model, style, options, before if not phases else None, say))
        return {
            "model": model,
            "before": before.to_wire(),
            "without_learning": idle.summary(),
            "phases": phases,
            "failed_requests": sum(phase["while_learning"]["failed"] for phase in phases) + len(idle.errors),
        }


@asynccontextmanager
async def _background_client(client: AsyncOpenAI, model: str, questions: list[Question]) -> AsyncIterator[Timings]:
    """Ask question after question in `_STREAMS` streams until the context ends, which drops those in flight."""
    client, timings = client.with_options(max_retries=0), Timings()

    async def ask_on(start: int) -> None:
        for question in itertools.islice(itertools.cycle(questions), start, None, _STREAMS):
            timings.num_requests += 1
            try:
                await _time_answer(client, model, question.text, timings)
            except OpenAIError as error:
                timings.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.2)

    tasks = [asyncio.create_task(ask_on(start)) for start in range(_STREAMS)]
    try:
        yield timings
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _time_answer(client: AsyncOpenAI, model: str, question: str, timings: Timings) -> None:
    sent_s = last_s = time.perf_counter()
    is_first = True
    stream = await client.chat.completions.create(
        model=model,
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
            timings.ttft_s.append(now_s - sent_s)
            is_first = False
        else:
            timings.tbt_s.append(now_s - last_s)
        last_s = now_s


async def _teach(
    client: AsyncOpenAI, model: str, style: Style, options: DemoOptions, before: Survey | None, say: Say
) -> dict[str, Any]:
    asked = held_out_questions()[: options.questions]
    if before is None:
        before = await survey(client, model, asked, options.samples)
    old_live = await _live_version(client)
    say(
        f"{style.value}: {before.share(style):.0%} of answers, {before.right_share:.0%} right; posting preferences"
    )
    items = await make_preferences(client, model, preference_questions()[: options.preferences], style)
    started_s = time.monotonic()
    async with _background_client(client, model, asked) as timings:
        ids = await post_preferences(client, items)
        training = await _wait_until_learnt(client, options.timeout_s, say)
        learnt_s = time.monotonic() - started_s - _QUIET_S
    after = await survey(client, model, asked, options.samples)
    new_live = await _live_version(client)
    say(f"{style.value}: {after.share(style):.0%} of answers, {after.right_share:.0%} right, {new_live} is live")
    return {
        "style": style.value,
        "preferences": len(ids),
        "before": before.to_wire(),
        "after": after.to_wire(),
        "share_before": round(before.share(style), 3),
        "share_after": round(after.share(style), 3),
        "right_change": round(after.right_share - before.right_share, 3),
        "live_before": old_live,
        "live_after": new_live,
        "learnt_after_s": round(learnt_s, 1),
        "training": training,
        "while_learning": timings.summary(),
    }


async def _live_version(client: AsyncOpenAI) -> str:
    adapters: Any = await client.get("/adapters", cast_to=object)
    return str(adapters["live"])


async def _wait_until_learnt(client: AsyncOpenAI, timeout_s: float, say: Say) -> dict[str, Any]:
    """Until nothing has been queued, leased or running for a while."""
    deadline_s = time.monotonic() + timeout_s
    quiet_since_s: float | None = None
    steps_said = -1
    while time.monotonic() < deadline_s:
        state: Any = await client.get("/training", cast_to=object)
        if not state["enabled"]:
            raise DemoError("training is disabled on this server")
        executor, queue = state["executor"], state.get("queue", {"queued_pairs": 1, "leased_batches": 0})
        busy = executor["phase"] != "idle" or queue["queued_pairs"] or queue["leased_batches"]
        now_s = time.monotonic()
        quiet_since_s = None if busy else quiet_since_s or now_s
        if quiet_since_s is not None and now_s - quiet_since_s >= _QUIET_S:
            return {"steps": executor["steps"], "pairs": executor["pairs"], "last": executor["last"]}
        if executor["steps"] >= steps_said + 10:
            steps_said = executor["steps"]
            last = executor["last"]
            loss = f": loss {last['loss']:.3f}, margin {last['margin']:.2f}" if last else ""
            say(f"  step {steps_said}{loss}")
        await asyncio.sleep(_POLL_S)
    raise DemoError(f"the server was still learning after {timeout_s:.0f} s")


def _percentiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None, "max": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": round(1e3 * p50, 2), "p99": round(1e3 * p99, 2), "max": round(1e3 * max(values), 2)}
