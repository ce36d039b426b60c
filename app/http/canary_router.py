"""ASGI middleware that gives a share of the requests for `<name>` to the version on trial, and times both versions.

Without a trial a request costs one look at a flag. A request for the canary gets `<name>@v000N` as its model, as
if the client had asked for it: the answer names that version, like every answer names the one that gave it, and so
ratings of the answer are ratings of the version.
"""

import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.guard import BODY_KEY
from deployments.publishing.canary import CanaryTrial

_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages"}
)
_TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s*(\d+)')
"""The count in an answer's `usage`; in its text the quotes would be escaped."""


class CanaryRouter:
    """See the module docstring. Must stand behind `RequestGuard`, which parses the request."""

    def __init__(self, app: ASGIApp, trial: CanaryTrial, model_id: str) -> None:
        self._app = app
        self._trial = trial
        self._model_id = model_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with another model if it was drawn for the canary."""
        request = scope.get(BODY_KEY) if self._trial.is_running else None
        if (
            not isinstance(request, dict)
            or scope.get("path") not in _PATHS
            or request.get("model") not in (self._model_id, None)
        ):
            await self._app(scope, receive, send)
            return
        draw = self._trial.draw(_user_of(request))
        if draw.model is not None:
            receive = await _with_model(scope, receive, request, draw.model)
        timer = _Timer(send)
        try:
            await self._app(scope, receive, timer.send)
        except Exception:
            self._trial.observe(draw.version, within_slo=False)
            raise
        within_slo = timer.verdict(self._trial)
        if within_slo is not None:
            self._trial.observe(draw.version, within_slo=within_slo)


class _Timer:
    """When an answer came: one clock reading for each part."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started_s = time.perf_counter()
        self._first_s = 0.0
        self._last_s = 0.0
        self._num_parts = 0
        self._num_tokens = 0
        self._status = 0
        self._is_stream = False
        self._is_complete = False

    async def send(self, message: Message) -> None:
        """Forward and note."""
        await self._send(message)
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._is_stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
            return
        if message["type"] != "http.response.body":
            return
        if body := message.get("body"):
            self._last_s = time.perf_counter()
            self._first_s = self._first_s or self._last_s
            self._num_parts += 1
            if not self._is_stream and (counted := _TOKENS.search(body)):
                self._num_tokens = int(counted[1])
        self._is_complete = not message.get("more_body", False)

    def verdict(self, trial: CanaryTrial) -> bool | None:
        """Did the answer meet the targets? None if it says nothing of the version: refused, or given up."""
        if self._status >= 500:
            return False
        if self._status != 200 or not self._is_complete or not self._num_parts:
            return None
        if not self._is_stream:
            return trial.is_within_slo_in_all(self._last_s - self._started_s, self._num_tokens)
        pace_s = (self._last_s - self._first_s) / max(1, self._num_parts - 1)
        return trial.is_within_slo(self._first_s - self._started_s, pace_s)


def _user_of(request: dict[str, Any]) -> str | None:
    """Who asks, by OpenAI's old name for it or the new one."""
    for key in ("user", "safety_identifier"):
        if isinstance(user := request.get(key), str) and user:
            return user
    return None


async def _with_model(
    scope: Scope, receive: Receive, request: dict[str, Any], model: str
) -> Callable[[], Awaitable[Message]]:
    """A receive that gives the body with another model, and then listens to the real one (for the disconnect)."""
    message = await receive()  # the guard gives the whole body at once
    body = json.dumps({**json.loads(message["body"]), "model": model}).encode()
    scope[BODY_KEY] = {**request, "model": model}
    others = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    scope["headers"] = [*others, (b"content-length", str(len(body)).encode())]
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {**message, "body": body}

    return replay
