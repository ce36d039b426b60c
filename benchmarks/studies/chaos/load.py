"""Load on a server while it is being killed, and whether its store holds exactly what it thanked for.

Chat is never repeated; feedback is repeated, under the same id, until it is acknowledged. Times are seconds of
`time.monotonic()`.
"""

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.harness.client import Load, Request, RequestRecord
from benchmarks.harness.server import ServerError
from engine.tiny.knowledge import Style, held_out_questions, preference_questions, render

_USERS = 12
_PAIRS_PER_TASTE = 150
"""After so many preferences the preferred style changes, so that there is always something to learn."""
_MAX_TOKENS = 48
_FEEDBACK_TIMEOUT_S = 10.0
_REPEAT_PAUSE_S = 0.3
_READ_ATTEMPTS = 15
_REFUSALS = (400, 413, 422)
"""The record is wrong and stays so. Other answers pass: Serve's proxy says 404 until it knows of the application."""
_LIST_EVERY = 8
"""Every so many posts one is a list of three records."""
_WRITERS = 3

POST = Request("feedback", None)
"""Asks a `FeedbackPort` for its next post."""


def questions(rate_per_s: float, seed: int) -> Iterator[Request]:
    """Endless chat requests, one every 1/`rate_per_s` seconds from now on."""
    rng = random.Random(seed)
    pool = held_out_questions()
    started_s = time.monotonic()
    for number in itertools.count(1):
        messages = [{"role": "user", "content": rng.choice(pool).text}]
        yield Request(f"chat-{number}", messages, started_s + number / rate_per_s, _MAX_TOKENS)


def preferences(seed: int) -> Iterator[dict[str, Any]]:
    """Endless bodies of `POST /v1/feedback`; no id and no prompt comes twice, none is a near-duplicate."""
    rng = random.Random(seed)
    pool = preference_questions()
    styles = list(Style)
    used: set[tuple[int, ...]] = set()
    for number in itertools.count():
        while (both := tuple(rng.sample(range(len(pool)), 2))) in used:
            pass
        used.add(both)
        liked = styles[number // _PAIRS_PER_TASTE % len(styles)]
        disliked = rng.choice([style for style in styles if style is not liked])
        first, second = (pool[i] for i in both)
        yield {
            "id": f"chaos-{seed}-{number}",
            "prompt": [{"role": "user", "content": f"{first.text} {second.text}"}],
            "chosen": f"{render(first, liked)} {render(second, liked)}",
            "rejected": f"{render(first, disliked)} {render(second, disliked)}",
            "user": f"user-{rng.randrange(_USERS)}",
        }


@dataclass(frozen=True, slots=True)
class Audit:
    """The store against the ledger."""

    acknowledged: int
    in_doubt: int
    """Sent, never acknowledged: they may be there or not, but not twice."""
    in_doubt_stored: int
    lost: list[str]
    """Acknowledged ids that are not there, are not what was sent, or have no pair."""
    duplicated: list[str]
    """Ids that are there more than once, or whose content or pair is."""
    unknown: int
    """Records that nobody sent."""


@dataclass(slots=True)
class Ledger:
    """Bodies by id as they were sent, and which ids the server thanked for."""

    sent: dict[str, dict[str, Any]] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    """Ids that the server called wrong, and its words: then the run itself is wrong."""
    answers: Counter[str] = field(default_factory=Counter)
    """Posts by HTTP status, or by the name of the transport error."""
    repeats: int = 0
    """Posts that were repeated because the one before was not acknowledged."""
    last_acknowledged_s: float = 0.0

    def audit(self, stored: Iterable[dict[str, Any]], exported: Iterable[dict[str, Any]]) -> Audit:
        """Compare what was sent with what the store has.

        Args:
            stored: every entry of `GET /v1/feedback`.
            exported: every row of `GET /v1/feedback/export?format=trl`, one for each pair.
        """
        entries = list(stored)
        ids = Counter(str(entry["id"]) for entry in entries)
        found = {str(entry["id"]): _content(entry["item"]) for entry in entries}
        contents = Counter(_content(entry["item"]) for entry in entries)
        pairs = Counter(_content(row) for row in exported)
        wanted = {one: _content(self.sent[one]) for one in self.acknowledged}
        lost = [one for one, content in wanted.items() if found.get(one) != content or not pairs[content]]
        doubled = [
            one for one, content in found.items() if ids[one] > 1 or contents[content] > 1 or pairs[content] > 1
        ]
        in_doubt = self.sent.keys() - self.acknowledged - self.refused.keys()
        return Audit(
            acknowledged=len(self.acknowledged),
            in_doubt=len(in_doubt),
            in_doubt_stored=len(in_doubt & ids.keys()),
            lost=sorted(lost),
            duplicated=sorted(doubled),
            unknown=len(ids.keys() - self.sent.keys()),
        )


def _content(item: dict[str, Any]) -> tuple[str, ...]:
    """Texts of prompt, chosen and rejected; of a conversation, its last message."""
    values = (item.get(name) for name in ("prompt", "chosen", "rejected"))
    return tuple(str(v[-1].get("content") if isinstance(v, list) and v else v) for v in values)


class FeedbackPort:
    """Each request posts the next record, or now and then three, until it is acknowledged or refused."""

    def __init__(self, client: httpx.AsyncClient, bodies: Iterator[dict[str, Any]], ledger: Ledger) -> None:
        self._client = client
        self._bodies = bodies
        self._ledger = ledger
        self._posts = 0

    async def stream(self, request: Request, record: RequestRecord) -> AsyncIterator[int]:  # noqa: ARG002
        """Post; there is nothing to stream. See `Port.stream`."""
        self._posts += 1
        bodies = list(itertools.islice(self._bodies, 1 if self._posts % _LIST_EVERY else 3))
        self._ledger.sent |= {body["id"]: body for body in bodies}
        while bodies := await self._post(bodies):
            self._ledger.repeats += 1
            await asyncio.sleep(_REPEAT_PAUSE_S)
        yield 0  # no tokens

    async def _post(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Post once; returns the bodies that were not acknowledged."""
        ledger = self._ledger
        content = bodies[0] if len(bodies) == 1 else {"items": bodies}
        try:
            reply = await self._client.post("/v1/feedback", json=content, timeout=_FEEDBACK_TIMEOUT_S)
        except httpx.HTTPError as error:
            ledger.answers[type(error).__name__] += 1
            return bodies
        ledger.answers[str(reply.status_code)] += 1
        if reply.status_code in _REFUSALS:
            ledger.refused |= {body["id"]: reply.text[:200] for body in bodies}
            return []
        if reply.status_code != 202:
            return bodies
        rows = reply.json().get("data", [reply.json()])
        accepted = {row["id"] for row in rows if row["status"] in ("accepted", "duplicate")}
        ledger.acknowledged |= accepted
        ledger.last_acknowledged_s = time.monotonic()
        return [body for body in bodies if body["id"] not in accepted]


async def write_feedback(load: Load, interval_s: float) -> None:
    """Post about every `interval_s` while the server answers; while not, three posts wait. Runs until cancelled."""

    async def write(number: int) -> None:
        await asyncio.sleep(number * interval_s)
        while True:
            await asyncio.wait([load.send(POST)])
            await asyncio.sleep(_WRITERS * interval_s)

    await asyncio.gather(*(write(number) for number in range(_WRITERS)))


async def read_all_feedback(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """Read every entry of `GET /v1/feedback`, page by page."""
    entries: list[dict[str, Any]] = []
    while True:
        parameters = {"limit": 1000, **({"after": entries[-1]["id"]} if entries else {})}
        page = (await _get(client, "/v1/feedback", parameters)).json()
        entries += page["data"]
        if not page["has_more"]:
            return entries


async def export_all_pairs(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """Read every row of the export."""
    reply = await _get(client, "/v1/feedback/export", {"format": "trl"})
    return [json.loads(line) for line in reply.text.splitlines()]


async def _get(client: httpx.AsyncClient, path: str, parameters: dict[str, Any]) -> httpx.Response:
    """Read; the last kill may be felt for a while, so a failed call is repeated."""
    for _ in range(_READ_ATTEMPTS):
        with contextlib.suppress(httpx.HTTPError):
            return (await client.get(path, params=parameters, timeout=120)).raise_for_status()
        await asyncio.sleep(2.0)
    raise ServerError(f"{path} cannot be read")
