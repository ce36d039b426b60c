"""ASGI middleware for Ray Serve's HTTP proxy: names a request's prefixes before it is routed.

Serve routes a request by its HTTP scope; the body goes to the replica later, past the router. The proxy's own
middlewares see both. This one reads the body, adds `deployments.routing.prefix_text.HEADER` to the scope, and
gives the body on
unchanged. Bodies of unknown length, or too long, pass by unread: their requests are routed by load and session.

Serve takes middlewares for its proxies from a function named by an environment variable of theirs:
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.routing.prefix_proxy.middlewares` (`mace serve` sets it).
"""

import json
import logging
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.routing.prefix_text import HEADER, MAX_TEXT_BYTES, prefixes_of

logger = logging.getLogger(__name__)

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "deployments.routing.prefix_proxy.middlewares"

_MAX_BODY_BYTES = 2 * MAX_TEXT_BYTES


def middlewares() -> list[Middleware]:
    """What Serve asks for."""
    return [Middleware(PrefixNames)]


class PrefixNames:
    """See the module docstring."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with its prefixes named if it has a JSON body of known length."""
        if scope["type"] == "http":
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() != HEADER]
            if scope["method"] == "POST" and _is_short_json(scope["headers"]):
                messages = await _read(receive)
                header = _header_of(b"".join(message.get("body", b"") for message in messages))
                if header is not None:
                    scope["headers"].append((HEADER, header))
                receive = _replay(messages, receive)
        await self._app(scope, receive, send)


def _is_short_json(headers: list[tuple[bytes, bytes]]) -> bool:
    fields = {name.lower(): value for name, value in headers}
    length = fields.get(b"content-length", b"")
    is_short = length.isdigit() and len(length) <= len(str(_MAX_BODY_BYTES)) and int(length) <= _MAX_BODY_BYTES
    return is_short and fields.get(b"content-type", b"").startswith(b"application/json")


async def _read(receive: Receive) -> list[Message]:
    """Messages up to the end of the body, or the client's disconnect."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def _header_of(body: bytes) -> bytes | None:
    try:
        prefixes = prefixes_of(json.loads(body))
    except (ValueError, RecursionError):
        return None  # no JSON: the replica says what is wrong with it
    except Exception:  # raised from here, it would leave the request without an answer
        logger.exception("a request's prefixes could not be named")
        return None
    return prefixes.to_header() if prefixes is not None else None


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A receive that gives what was read, and then listens to the real one (for the disconnect)."""
    given = iter(messages)

    async def replay() -> Any:
        message = next(given, None)
        return await receive() if message is None else message

    return replay
