"""SLO targets of `slo: auto`: measured once, without training, from what clients of this server see; then kept.

The measurement sends streams through vLLM's HTTP application before the executor is ready, so nobody else is served and
nothing is trained. Whatever happens later, the targets stay: a slow day must not become the standard.
"""

import asyncio
import json
import logging
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from core.config import AppArgs, SloConfig
from core.errors import ProfileError
from deployments.monitors.edge import ONE_CHUNK_S
from profiler.profile import MeasuredFile
from scheduler.iteration.edge import ATTAINMENT_GOAL, upper_quantile
from scheduler.iteration.slo import ROOM, TYPICAL_PROMPT

logger = logging.getLogger(__name__)

_CLIENTS = 4
_TOKENS = 24
"""Of a client's answers; each client's next one has four more, so that prompts fall between the others' tokens."""
_ENOUGH_GAPS, _ENOUGH_ANSWERS = 500, 24
_MEASURE_S = 20.0


class Targets(MeasuredFile):
    """What four clients saw without training, in seconds, and the targets made of it."""

    title: ClassVar[str] = "measured targets"
    command: ClassVar[str] = "delete the file, and the next start with `slo: auto` measures"

    ttft_s: float
    tbt_s: float
    ttft_p99_s: float
    tbt_p99_s: float
    num_gaps: int

    @property
    def slo(self) -> SloConfig:
        """As settings."""
        return SloConfig(auto=True, ttft_s=self.ttft_s, tbt_s=self.tbt_s)


def targets_path(args: AppArgs) -> Path:
    """Where the targets of this device and model are kept, beside their profile."""
    assert args.profile.path is not None  # filled in at the start
    return args.profile.path.with_suffix(".slo.json")


def kept_targets(path: Path) -> Targets | None:
    """The targets that were measured at an earlier start; None if there are none that can be read."""
    if not path.exists():
        return None
    try:
        return Targets.load(path)
    except ProfileError as error:
        logger.warning("%s", error)
        return None


async def measure_targets(app: Any, args: AppArgs, model: str, vocab_size: int, max_model_len: int) -> Targets:
    """Ask `model` of vLLM's ASGI application as four clients would.

    Raises:
        ProfileError: the server did not answer, so there is nothing to make targets of.
    """
    gaps_s: list[float] = []
    firsts_s: list[float] = []
    ends_s = time.perf_counter() + _MEASURE_S
    rng = random.Random(0)
    keys = args.engine.frontend_kwargs.get("api_key") or []

    async def be_client(number: int) -> None:
        num_tokens = min(_TOKENS + 4 * number, max_model_len // 4)
        is_warm = False
        while time.perf_counter() < ends_s and (len(gaps_s) < _ENOUGH_GAPS or len(firsts_s) < _ENOUGH_ANSWERS):
            prompt = [rng.randrange(vocab_size) for _ in range(min(TYPICAL_PROMPT, max_model_len // 2))]
            body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
            times_s = await _stream(app, "/v1/completions", body, keys)
            if is_warm:  # the first answers pay for lazy set-up
                firsts_s.append(times_s[1] - times_s[0])
                gaps_s.extend(b - a for a, b in pairwise(times_s[1:]) if b - a >= ONE_CHUNK_S)
            is_warm = True

    await asyncio.gather(*map(be_client, range(_CLIENTS)))
    ttft_p99_s, tbt_p99_s = (upper_quantile(values, ATTAINMENT_GOAL) for values in (firsts_s, gaps_s))
    if not ttft_p99_s or not tbt_p99_s:
        raise ProfileError(f"no two answers of {_CLIENTS} clients were finished in {_MEASURE_S:g} s")
    return Targets(
        ttft_s=float(f"{ROOM * ttft_p99_s:.2g}"),
        tbt_s=float(f"{ROOM * tbt_p99_s:.2g}"),
        ttft_p99_s=ttft_p99_s,
        tbt_p99_s=tbt_p99_s,
        num_gaps=len(gaps_s),
    )


async def _stream(app: Any, path: str, body: dict[str, Any], keys: list[str]) -> list[float]:
    """Times (`time.perf_counter`) of asking and of each part of the answer."""
    times_s, status = [time.perf_counter()], 0
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    never = asyncio.Event()
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await never.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        if part := message.get("body"):
            times_s.append(time.perf_counter())
            parts.append(part)

    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    headers += [(b"authorization", f"Bearer {key}".encode()) for key in keys[:1]]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    if status != 200 or len(times_s) < 3:
        raise ProfileError(f"targets could not be measured: HTTP {status}: {b''.join(parts)[:500]!r}")
    return times_s
