"""A prompt's prefixes as short names, and the middleware of Ray Serve's HTTP proxy that puts them into a header.

A name is a digest of the request's text up to a fixed length. Two requests whose texts agree up to a length have the
same name there, whoever computes it. Lengths are multiples of 256 bytes up to 2 KiB and then grow by a quarter, so a
prompt has some forty names at most, and the longest one that two requests share is at least four fifths of what they
share. Names stand for text, not for tokens: they say where a prefix may be, and the engine's own cache decides.

Serve routes a request by its HTTP scope; the body goes to the replica later, past the router. The proxy's own
middlewares see both. `PrefixNames` reads the body, adds `HEADER` to the scope, and gives the body on unchanged.
Bodies of unknown length, or too long, pass by unread: their requests are routed by load and session. Serve takes
middlewares for its proxies from a function named by an environment variable of theirs (`mace serve` sets it).
"""

import json
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

HEADER = b"x-mace-prefix"
"""Set by `PrefixNames`, read by the router and the executor; what a client sends under it is dropped."""
CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "deployments.routing.prefix_names.middlewares"

MAX_TEXT_BYTES = 1 << 20
_MAX_BODY_BYTES = 2 * MAX_TEXT_BYTES
_MAX_PARTS = 2048
"""Messages of a conversation that are looked at; the proxy serves nobody else meanwhile."""
_STEP_BYTES = 256
_GROWTH = 1.25
_DIGEST_BYTES = 6
"""A collision sends a request to the wrong executor, which is then as slow as without any of this."""
_VALUE = re.compile(rb"(\d{1,7});((?:[0-9a-f]{12},)*[0-9a-f]{12})")
"""Digits of `MAX_TEXT_BYTES`; names of `_DIGEST_BYTES`."""


def _lengths() -> Iterator[int]:
    length = _STEP_BYTES
    while length <= MAX_TEXT_BYTES:
        yield length
        length = length + _STEP_BYTES if length < 8 * _STEP_BYTES else int(length * _GROWTH)


LENGTHS = tuple(_lengths())
"""Bytes of text that the names of a prompt cover, in their order."""


@dataclass(frozen=True, slots=True)
class TextPrefixes:
    """The names of one request, as the header carries them."""

    num_bytes: int
    """Length of the whole text."""
    digests: tuple[str, ...]
    """The names, for `LENGTHS`, as far as the text goes."""

    def to_header(self) -> bytes:
        """The header's value."""
        return f"{self.num_bytes};{','.join(self.digests)}".encode("ascii")

    @classmethod
    def from_headers(cls, headers: Any) -> "TextPrefixes | None":
        """Read ASGI headers; None without a valid one. Without the proxy's middleware a client may have sent it."""
        value = next((value for name, value in headers if name == HEADER), b"")
        found = _VALUE.fullmatch(value)
        if found is None:
            return None
        names = tuple(found[2].decode("ascii").split(","))
        return cls(int(found[1]), names) if len(names) <= len(LENGTHS) else None

    def bytes_among(self, names: Collection[str]) -> int:
        """Bytes of the text up to its longest prefix among `names`; 0 if there is none."""
        return max((LENGTHS[i] for i, name in enumerate(self.digests) if name in names), default=0)


def prefixes_of(body: Any) -> TextPrefixes | None:
    """Name the prefixes of a parsed request body; None if it has no prompt that is long enough.

    The text is the model's name and what chat templates put first to last: tools, instructions, then the messages.
    Several prompts in one request have no names: they share nothing with each other.
    """
    text = _text_of(body) if isinstance(body, dict) else None
    if text is None:
        return None
    data = text.encode("utf-8", "surrogatepass")[:MAX_TEXT_BYTES]
    digest, start, names = blake2b(digest_size=_DIGEST_BYTES), 0, []
    for length in LENGTHS:
        if length > len(data):
            break
        digest.update(data[start:length])
        names.append(digest.hexdigest())
        start = length
    return TextPrefixes(len(data), tuple(names)) if names else None


def _text_of(body: dict[str, Any]) -> str | None:
    prompt = body.get("messages", body.get("prompt", body.get("input")))
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0] if len(prompt) == 1 else None
    if not prompt:
        return None
    head = [body.get("model"), body.get("tools"), body.get("system"), body.get("instructions")]
    is_conversation = isinstance(prompt, list) and isinstance(prompt[0], dict)
    parts, left = [], MAX_TEXT_BYTES
    for part in (*filter(None, head), *(prompt[:_MAX_PARTS] if is_conversation else [prompt])):
        parts.append(_plain(part))
        left -= len(parts[-1])
        if left <= 0:
            break
    return "\x1e".join(parts)


def _plain(part: Any) -> str:
    """Leave text as it is, so that the share of it that two requests have in common is theirs in bytes too."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("content"), str):
        return f"{part.get('role')}\x1f{part['content']}"
    return json.dumps(part, ensure_ascii=False, separators=(",", ":"))


def middlewares() -> list[Middleware]:
    """Serve calls this, by the name in `CALLBACK`."""
    return [Middleware(PrefixNames)]


class PrefixNames:
    """ASGI middleware of the proxy; see the module docstring."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with its prefixes named if it has a JSON body of known length."""
        if scope["type"] == "http":
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() != HEADER]
            if scope["method"] == "POST" and _is_short_json(scope["headers"]):
                messages = [await receive()]
                while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
                    messages.append(await receive())
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
