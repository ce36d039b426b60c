"""Request classes over HTTP: OpenAI's `service_tier` becomes vLLM's `priority`, which the scheduler reads.

| `service_tier` | class | `priority` |
|---|---|---|
| absent, null, `auto`, `default`, `scale`, `priority`, `fast`; `standard_only` for `/v1/messages` | interactive | 0 |
| `flex`; `batch`, which OpenAI does not have | batch | 1 |

A `priority` field (lower is sooner, above 0 is class batch) or a header `X-Vllm-Priority` decides where it is given:
the tier is checked, and then has no say. The body is written anew only if something in it has to change.
"""

import json
from typing import Any

from starlette.types import Scope

from app.http.errors import BadRequestError

BATCH_PRIORITY = 1

_INTERACTIVE_TIERS = frozenset({"auto", "default", "scale", "priority", "fast"})
_BATCH_TIERS = frozenset({"flex", "batch"})
_VLLM_TIERS = {"batch": "flex", "fast": "priority"}
"""Tiers under a name that vLLM's models take."""

_PRIORITY_HEADER = b"x-vllm-priority"
_FIELD_PATHS = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"}
)
"""Routes whose requests have a `priority` field."""
_HEADER_PATHS = frozenset({"/v1/messages"})
"""Routes whose requests have none; vLLM reads its header there."""


def apply_request_class(scope: Scope, parsed: Any, body: bytes) -> bytes:
    """The body to pass on, with `priority` set from `service_tier`.

    Args:
        scope: ASGI scope of the request; its headers are replaced if they have to change.
        parsed: the body, parsed.
        body: the body.

    Raises:
        BadRequestError: a `service_tier` that does not exist, on a route that generates.
    """
    if not isinstance(parsed, dict) or parsed.get("service_tier") is None:
        return body
    tier, path = parsed["service_tier"], scope["path"]
    if path in _FIELD_PATHS:
        _check(tier, _INTERACTIVE_TIERS | _BATCH_TIERS)
        return _rewrite(scope, parsed, tier) if tier in _BATCH_TIERS or tier in _VLLM_TIERS else body
    if path in _HEADER_PATHS:
        _check(tier, _INTERACTIVE_TIERS | _BATCH_TIERS | {"standard_only"})
        if tier in _BATCH_TIERS and _PRIORITY_HEADER not in (name.lower() for name, _ in scope["headers"]):
            _set_header(scope, _PRIORITY_HEADER, str(BATCH_PRIORITY).encode())
    return body


def _check(tier: Any, known: frozenset[str]) -> None:
    if not isinstance(tier, str) or tier not in known:
        raise BadRequestError(
            f"service_tier {tier!r} does not exist; there are {', '.join(sorted(known))}", "service_tier"
        )


def _rewrite(scope: Scope, parsed: dict[str, Any], tier: str) -> bytes:
    default = {"priority": BATCH_PRIORITY} if tier in _BATCH_TIERS else {}
    body = json.dumps({**default, **parsed, "service_tier": _VLLM_TIERS.get(tier, tier)}).encode()
    _set_header(scope, b"content-length", str(len(body)).encode())
    return body


def _set_header(scope: Scope, name: bytes, value: bytes) -> None:
    others = [(key, old) for key, old in scope["headers"] if key.lower() != name]
    scope["headers"] = [*others, (name, value)]
