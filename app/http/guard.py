"""ASGI middleware in front of every route: body size, internal keys, request class, what would end the engine, and
the parsed body for those behind it.

Fine-tune work enters only from inside: vLLM passes `vllm_xargs` on to `SamplingParams.extra_args`, where our
scheduler looks for tasks, so a body that carries one of our keys at any depth is refused.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.errors import BadRequestError, error_response
from app.http.request_class import apply_request_class
from core.config import KV_PRUNING_OPT_OUT

INTERNAL_PREFIX = "mace_"
BODY_KEY = "mace.body"
"""Where the parsed JSON body stands in the ASGI scope; absent if it is no JSON."""

_ARGUMENT_KEYS = frozenset({"vllm_xargs", "extra_args"})
_PROMPT_LOGPROBS = frozenset({"prompt_logprobs", "echo"})
_METHODS = frozenset({"POST", "PUT", "PATCH"})


class RequestGuard:
    """See the module docstring."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, on_refused: Callable[[str], None]) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with its body replayed (see `app.http.request_class`), or answer 400 or 413."""
        if scope["type"] != "http" or scope["method"] not in _METHODS:
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            scope[BODY_KEY] = parsed = _parse(body)
            check_internal_keys(parsed)
            check_prompt_logprobs(parsed)
            body = apply_request_class(scope, parsed, body)
        except BadRequestError as error:
            self._on_refused(_reason(error))
            response: JSONResponse = error_response(error)
            await response(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                break  # the client is gone; what is behind us finds out by itself
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                break
        return b"".join(parts)

    def _too_large(self) -> BadRequestError:
        return BadRequestError(f"the request body is larger than {self._max_body_bytes} bytes", status=413)


def _reason(error: BadRequestError) -> str:
    if error.status == 413:
        return "body_too_large"
    if error.param in _PROMPT_LOGPROBS:
        return "prompt_logprobs"
    return "internal_key" if error.param in _ARGUMENT_KEYS else "service_tier"


def check_internal_keys(value: Any) -> None:
    """Refuse `vllm_xargs` and `extra_args`, at any depth, that carry a key of ours.

    Raises:
        BadRequestError: naming the key.
    """
    stack = [value]
    while stack:
        current = stack.pop()
        if isinstance(current, dict):
            for key in _ARGUMENT_KEYS & current.keys():
                _check_arguments(key, current[key])
            stack.extend(current.values())
        elif isinstance(current, list):
            stack.extend(current)


def check_prompt_logprobs(value: Any) -> None:
    """Refuse log-probabilities of the prompt: with LoRA they end vLLM's engine, and so every request on it.

    vLLM computes them with the adapter mapping of the sampled tokens (vllm #16668).

    Raises:
        BadRequestError: `prompt_logprobs`, or `echo` together with `logprobs`.
    """
    for part in [value, *(value.get("requests") or ())] if isinstance(value, dict) else ():
        if not isinstance(part, dict):
            continue
        if part.get("prompt_logprobs") is not None:
            raise BadRequestError(
                "prompt_logprobs cannot be computed while adapters are served", "prompt_logprobs"
            )
        if part.get("echo") and part.get("logprobs") is not None:
            message = "echo with logprobs asks for those of the prompt, which no server of adapters can compute"
            raise BadRequestError(message, "echo")


def _check_arguments(name: str, arguments: Any) -> None:
    for key, value in arguments.items() if isinstance(arguments, dict) else ():
        if key == KV_PRUNING_OPT_OUT and not isinstance(value, bool):
            raise BadRequestError(f"{name}: {KV_PRUNING_OPT_OUT} is true or false, not {value!r}", name)
        if str(key).strip().lower().startswith(INTERNAL_PREFIX):
            raise BadRequestError(f"{name} may not carry {key!r}: keys with {INTERNAL_PREFIX} are internal", name)


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None  # no JSON: the route says what is wrong with it


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A receive that gives the body once and then listens to the real one (for the disconnect)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
