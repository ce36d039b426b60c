"""The demo's course: survey, then for one taste after the other: prefer it, wait until it is learnt, survey again.

A background client keeps asking meanwhile and times what it gets. Time to first token (TTFT) includes queueing and the
HTTP stack; time between tokens (TBT) is the gap between two streamed chunks. Failed requests are counted, never
retried.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from openai import AsyncOpenAI, OpenAIError

from app.demo.guard import MAX_FALL, MAX_LOSS_RISE, MAX_REPETITION_RISE, Guard
from app.demo.subjects import subject_of
from app.demo.taste import DemoError, Subject, Survey, User

_QUIET_S = 3.0
"""Learning is over when nothing was queued or running for this long."""
_POLL_S = 0.5
_SAY_EVERY_S = 10.0
_TIMED_S = 5.0
"""Time that the server is timed for before it learns."""
_STREAMS = 2
"""Questions of the background client that are asked at a time."""

_REQUEST_LIMIT_S = 600.0
"""For each step of a request, the connection too: a machine that is at its limit may need seconds to take one."""
_NUM_EXAMPLES = 20
"""Held-out questions, the first ones, whose answers are shown before and after."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The demo's questions, tastes and waiting times."""

    base_url: str
    tastes: Sequence[str] = ()
    """In the order in which they are taught; empty for the course of the model that is served."""
    preferences: int = 60
    questions: int = 60
    samples: int = 4
    timeout_s: float = 600.0
    guard: bool = True
    """Whether to measure what the model can besides, where the subject does not judge that itself."""
    api_key: str = "none"


@dataclass(slots=True)
class Answer:
    """What the background client measured of one answer, in seconds."""

    sent_s: float
    """When it was asked for, since the client started."""
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Timings:
    """Everything that the background client measured so far."""

    started_s: float = field(default_factory=time.perf_counter)
    answers: list[Answer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Percentiles of all answers, and the answers themselves, in milliseconds; None without samples."""
        answers = []
        for answer in self.answers:
            gaps = _percentiles(answer.gaps_s)
            ttft_ms = None if answer.ttft_s is None else round(1e3 * answer.ttft_s, 2)
            answers.append(
                {
                    "sent_s": round(answer.sent_s, 2),
                    "ttft_ms": ttft_ms,
                    "gap_p50_ms": gaps["p50"],
                    "gap_max_ms": gaps["max"],
                }
            )
        return {
            "requests": len(self.answers),
            "failed": len(self.errors),
            "errors": self.errors[:5],
            "ttft_ms": _percentiles([answer.ttft_s for answer in self.answers if answer.ttft_s is not None]),
            "tbt_ms": _percentiles([gap_s for answer in self.answers for gap_s in answer.gaps_s]),
            "answers": answers,
        }


async def run_demo(options: DemoOptions, say: Say) -> dict[str, Any]:
    """Run it all; returns the report that `--json` prints.

    Raises:
        openai.OpenAIError: the server is not there or refuses.
        DemoError: it serves a model that no program judges, lacks a taste that was asked for, or is still learning
            after `DemoOptions.timeout_s`.
    """
    async with AsyncOpenAI(
        base_url=f"{options.base_url}/v1", api_key=options.api_key, max_retries=0, timeout=_REQUEST_LIMIT_S
    ) as client:
        card = (await client.models.list()).data[0]
        model, root = card.id, str(getattr(card, "root", ""))
        subject = subject_of(root)
        if subject is None:
            raise DemoError(
                f"the demo judges the answers of the two built-in models, but {model} is {root}; "
                "start `make serve`, or `mace serve serve_config.tiny.yaml`"
            )
        unknown = [taste for taste in options.tastes if taste not in subject.tastes]
        if unknown:
            raise DemoError(f"the demo knows no taste {unknown[0]} for {model}, only {', '.join(subject.tastes)}")
        return await _Demo(client, User(client, model, subject), options, say).run()


class _Demo:
    def __init__(self, client: AsyncOpenAI, user: User, options: DemoOptions, say: Say) -> None:
        self._client, self._user, self._options, self._say = client, user, options, say
        self._subject = user.subject
        knows_truth = user.subject.knows_truth
        self._guard = Guard(client, user.model) if options.guard and not knows_truth else None

    async def run(self) -> dict[str, Any]:
        """Every taste, one after the other."""
        options, subject = self._options, self._subject
        asked = min(options.questions, len(subject.held_out))
        self._say(f"{self._user.model}: asking {asked} held-out questions, {options.samples} times each")
        before = await self._survey()
        abilities = await self._abilities()
        examples = await self._examples()
        async with _background_client(self._client, self._user.model, subject) as idle:
            await asyncio.sleep(_TIMED_S + 2 * subject.pause_s)
        report: dict[str, Any] = {
            "model": self._user.model,
            "before": before.to_wire(),
            "abilities": abilities,
            "without_learning": idle.summary(),
            "phases": [],
        }
        latest = before
        for taste in options.tastes or subject.course:
            phase, latest = await self._teach(taste, latest)
            if self._guard is not None and abilities is not None:
                phase["abilities"] = await self._guard.measure()
                phase["kept"] = _kept(abilities, phase["abilities"], before, latest)
                self._say(_told(phase["abilities"], latest))
            report["phases"].append(phase)
        answers = await self._examples()
        report["examples"] = [
            {"question": question, "before": old, "after": new}
            for question, old, new in zip(subject.held_out, examples, answers, strict=False)
        ]
        report["failed_requests"] = len(idle.errors)
        report["failed_requests"] += sum(phase["while_learning"]["failed"] for phase in report["phases"])
        return report

    async def _survey(self) -> Survey:
        return await self._user.survey(self._options.questions, self._options.samples)

    async def _abilities(self) -> dict[str, Any] | None:
        if self._guard is None:
            return None
        self._say("asking questions with one right answer, and reading neutral texts")
        abilities = await self._guard.measure()
        self._say(f"{abilities['right']:.1%} right; loss on neutral texts {abilities['neutral_loss']:.3f}")
        return abilities

    async def _examples(self) -> list[str]:
        if self._guard is None:
            return []
        return await self._guard.answers(self._subject.held_out[:_NUM_EXAMPLES], self._subject.max_tokens)

    async def _teach(self, taste: str, before: Survey) -> tuple[dict[str, Any], Survey]:
        """Prefer a taste until it is learnt: what happened, and how the model answers then."""
        options, say = self._options, self._say
        old_live = await self._live_version()
        say(f"{taste}: {_shares(before, taste)}; drawing {options.preferences} preferences")
        items = await self._user.preferences(taste, options.preferences)
        started_s = time.monotonic()
        async with _background_client(self._client, self._user.model, self._subject) as timings:
            ids = await self._user.post(items)
            say(f"  {len(ids)} preferences are posted")
            training = await self._wait_until_learnt(old_live, started_s)
            learnt_s = time.monotonic() - started_s - _QUIET_S
        after = await self._survey()
        new_live = await self._live_version()
        say(f"{taste}: {_shares(after, taste)}, {new_live} is live after {learnt_s:.0f} s")
        phase = {
            "taste": taste,
            "preferences": len(ids),
            "from_own_samples": sum(item.get("type") == "preference" for item in items),
            "before": before.to_wire(),
            "after": after.to_wire(),
            "share_before": round(before.shares[taste], 3),
            "share_after": round(after.shares[taste], 3),
            "live_before": old_live,
            "live_after": new_live,
            "learnt_after_s": round(learnt_s, 1),
            "training": training,
            "targets_ms": await self._targets(),
            "while_learning": timings.summary(),
        }
        return phase, after

    async def _live_version(self) -> str:
        adapters: Any = await self._client.get("/adapters", cast_to=object)
        return str(adapters["live"])

    async def _targets(self) -> dict[str, float]:
        """The server's latency targets in milliseconds."""
        state: Any = await self._client.get("/training", cast_to=object)
        slo = state["executor"]["slo"]
        return {"ttft": 1e3 * slo["ttft_s"], "tbt": 1e3 * slo["tbt_s"]}

    async def _wait_until_learnt(self, old_live: str, started_s: float) -> dict[str, Any]:
        """Until nothing has been queued, leased or running for a while."""
        deadline_s = started_s + self._options.timeout_s
        quiet_since_s: float | None = None
        steps_said: int | None = None
        said_s = started_s
        live = old_live
        versions: list[dict[str, Any]] = []
        while time.monotonic() < deadline_s:
            state: Any = await self._client.get("/training", cast_to=object)
            if not state["enabled"]:
                raise DemoError("training is disabled on this server")
            executor, queue = state["executor"], state.get("queue", {"queued_pairs": 1, "leased_batches": 0})
            busy = executor["phase"] != "idle" or queue["queued_pairs"] or queue["leased_batches"]
            now_s = time.monotonic()
            quiet_since_s = None if busy else quiet_since_s or now_s
            if quiet_since_s is not None and now_s - quiet_since_s >= _QUIET_S:
                counts = {name: executor[name] for name in ("steps", "pairs", "last")}
                return counts | {"versions": versions}
            if (now_live := await self._live_version()) != live:
                live = now_live
                versions.append({"version": live, "after_s": round(now_s - started_s, 1)})
                self._say(f"  {live} is live after {now_s - started_s:.0f} s")
            steps_said = executor["steps"] if steps_said is None else steps_said
            if executor["steps"] != steps_said and now_s - said_s >= _SAY_EVERY_S:
                steps_said, said_s = executor["steps"], now_s
                last = executor["last"]
                loss = f": loss {last['loss']:.3f}, margin {last['margin']:.2f}" if last else ""
                self._say(f"  step {steps_said}{loss}")
            await asyncio.sleep(_POLL_S)
        raise DemoError(f"the server was still learning after {self._options.timeout_s:.0f} s")


def _shares(survey: Survey, taste: str) -> str:
    right = "" if survey.right_share is None else f", {survey.right_share:.0%} right"
    return f"{survey.shares[taste]:.0%} of answers{right}"


def _told(abilities: dict[str, Any], survey: Survey) -> str:
    return (
        f"  right: {abilities['right']:.1%} of {abilities['items']} questions; loss on neutral texts "
        f"{abilities['neutral_loss']:.3f}; repetition {survey.repetition:.3f}"
    )


def _kept(start: dict[str, Any], now: dict[str, Any], before: Survey, after: Survey) -> bool:
    """Whether the model still can what it could before it was taught anything."""
    return bool(
        now["right"] >= start["right"] - MAX_FALL
        and now["neutral_loss"] <= start["neutral_loss"] + MAX_LOSS_RISE
        and after.repetition <= before.repetition + MAX_REPETITION_RISE
    )


@asynccontextmanager
async def _background_client(client: AsyncOpenAI, model: str, subject: Subject) -> AsyncIterator[Timings]:
    """Ask question after question in `_STREAMS` streams until the context ends, which drops those in flight."""
    client, timings = client.with_options(max_retries=0), Timings()

    async def ask_on(start: int) -> None:
        for question in itertools.islice(itertools.cycle(subject.held_out), start, None, _STREAMS):
            timings.answers.append(answer := Answer(time.perf_counter() - timings.started_s))
            try:
                await _time_answer(client, model, question, answer)
            except OpenAIError as error:
                timings.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.2)
            await asyncio.sleep(subject.pause_s)

    tasks = [asyncio.create_task(ask_on(start)) for start in range(_STREAMS)]
    try:
        yield timings
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _time_answer(client: AsyncOpenAI, model: str, question: str, answer: Answer) -> None:
    last_s = time.perf_counter()
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
        if answer.ttft_s is None:
            answer.ttft_s = now_s - last_s
        else:
            answer.gaps_s.append(now_s - last_s)
        last_s = now_s


def _percentiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None, "max": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": round(1e3 * p50, 2), "p99": round(1e3 * p99, 2), "max": round(1e3 * max(values), 2)}
