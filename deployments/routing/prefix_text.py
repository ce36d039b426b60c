"""A prompt's prefixes as short names: digests of the request's text up to fixed lengths.

Two requests whose texts agree up to a length have the same digest there, whoever computes it. Lengths are multiples of
256 bytes up to 2 KiB and then grow by a quarter, so a prompt has some forty digests at most, and the longest one that
two requests share is at least four fifths of what they share.

The digests stand for text, not for tokens: they say where a prefix may be, and the engine's own cache decides.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

HEADER = b"x-mace-prefix"
"""Set by `deployments.routing.prefix_proxy`, read by the router and the executor; what a client sends under it is
dropped."""

MAX_TEXT_BYTES = 1 << 20
_STEP_BYTES = 256
_GROWTH = 1.25
_DIGEST_BYTES = 6
"""A collision sends a request to the wrong executor, which is then as slow as without any of this."""

_VALUE = re.compile(rb"(\d{1,7});((?:[0-9a-f]{12},)*[0-9a-f]{12})")
"""Digits of `MAX_TEXT_BYTES`; names of `_DIGEST_BYTES`."""
_MAX_PARTS = 2048
"""Messages of a conversation that are looked at; the proxy serves nobody else meanwhile."""


def _lengths() -> Iterator[int]:
    length = _STEP_BYTES
    while length <= MAX_TEXT_BYTES:
        yield length
        length = length + _STEP_BYTES if length < 8 * _STEP_BYTES else int(length * _GROWTH)


LENGTHS = tuple(_lengths())
"""Bytes of text that the digests of a prompt cover, in their order."""


@dataclass(frozen=True, slots=True)
class TextPrefixes:
    """What the header says of a request."""

    num_bytes: int
    """Of the whole text."""
    digests: tuple[str, ...]
    """For `LENGTHS`, as far as the text goes."""

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


def prefixes_of(body: Any) -> TextPrefixes | None:
    """Digests of a parsed request body; None if it has no prompt that is long enough.

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
    """Text as it is, so that the share of it that two requests have in common is theirs in bytes too."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("content"), str):
        return f"{part.get('role')}\x1f{part['content']}"
    return json.dumps(part, ensure_ascii=False, separators=(",", ":"))
