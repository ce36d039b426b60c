"""The demo's course: survey, prefer one style, wait, survey, prefer another, wait, survey."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from app.demo.background import BackgroundClient
from app.demo.taste import Survey, make_preferences, post_preferences, survey
from engine.tiny.knowledge import held_out_questions, preference_questions
from engine.tiny.styles import Style

_QUIET_S = 3.0
"""Learning is over when nothing was queued or running for this long."""
_POLL_S = 0.5

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to ask and how long to wait."""

    base_url: str
    first: Style
    second: Style
    preferences: int = 60
    questions: int = 60
    samples: int = 8
    timeout_s: float = 300.0
    api_key: str = "none"


class WrongModelError(RuntimeError):
    """The server does not serve the built-in model."""


class LearningTimeoutError(RuntimeError):
    """The server did not finish learning in time."""


async def run_demo(options: DemoOptions, say: Say) -> dict[str, Any]:
    """Run it all; returns the report that `--json` prints.

    Raises:
        openai.OpenAIError: the server is not there or refuses.
        WrongModelError: the server does not serve the built-in model.
        LearningTimeoutError: see `DemoOptions.timeout_s`.
    """
    async with AsyncOpenAI(base_url=f"{options.base_url}/v1", api_key=options.api_key, max_retries=0) as client:
        card = (await client.models.list()).data[0]
        model, root = card.id, getattr(card, "root", "")
        if not str(root).startswith("tiny-assistant"):
            raise WrongModelError(f"the demo judges the built-in model's answers, but {model} is {root}")
        asked = held_out_questions()[: options.questions]
        say(f"{model}: asking {len(asked)} held-out questions, {options.samples} times each")
        before = await survey(client, model, asked, options.samples)
        idle = await _time_quiet_server(client, model, [question.text for question in asked])
        phases: list[dict[str, Any]] = []
        for style in (options.first, options.second):
            phases.append(await _teach(client, model, style, options, before if not phases else None, say))
        return {
            "model": model,
            "before": before.to_wire(),
            "without_learning": idle,
            "phases": phases,
            "failed_requests": sum(phase["while_learning"]["failed"] for phase in phases) + idle["failed"],
        }


async def _time_quiet_server(client: AsyncOpenAI, model: str, questions: list[str]) -> dict[str, Any]:
    async with BackgroundClient(client, model, questions) as background:
        await asyncio.sleep(5.0)
    return background.timings.summary()


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
    async with BackgroundClient(client, model, [question.text for question in asked]) as background:
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
        "while_learning": background.timings.summary(),
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
            raise LearningTimeoutError("training is disabled on this server")
        executor, queue = state["executor"], state.get("queue", {"queued_pairs": 1, "leased_batches": 0})
        busy = executor["phase"] != "idle" or queue["queued_pairs"] or queue["leased_batches"]
        now_s = time.monotonic()
        quiet_since_s = None if busy else quiet_since_s or now_s
        if quiet_since_s is not None and now_s - quiet_since_s >= _QUIET_S:
            return {"steps": executor["steps"], "pairs": executor["pairs"], "last": executor["last"]}
        if executor["steps"] >= steps_said + 10:
            steps_said = executor["steps"]
            last = executor["last"]
            say(
                f"  step {steps_said}"
                + (f": loss {last['loss']:.3f}, margin {last['margin']:.2f}" if last else "")
            )
        await asyncio.sleep(_POLL_S)
    raise LearningTimeoutError(f"the server was still learning after {timeout_s:.0f} s")
