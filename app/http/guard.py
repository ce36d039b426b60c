"""Rules for what clients send: no key that is ours alone, nothing that would end the engine, and request classes.

Fine-tune work enters only from inside: vLLM passes `vllm_xargs` on to `SamplingParams.extra_args`, where our
scheduler looks for tasks, so a body that carries one of our keys at any depth is refused.

OpenAI's `service_tier` becomes vLLM's `priority`, which the scheduler reads as the request's class:

| `service_tier` | class | `priority` |
|---|---|---|
| absent, null, `auto`, `default`, `scale`, `priority`, `fast`; `standard_only` for `/v1/messages` | interactive | 0 |
| `flex`; `batch`, which OpenAI does not have | background | 1 |

A `priority` field (lower is sooner, above 0 is class background) or a header `X-Vllm-Priority` decides where it is
given: the tier is checked, and then has no say. The body is written anew only if something in it has to change.
"""

from collections.abc import Collection
from typing import Any

from alignment.records.response_ids import new_request_id
from app.http.errors import BadRequestError
from app.http.request import MAX_ID_CHARS, ClientRequest, GoOn, Step
from core.config import KV_PRUNING_OPT_OUT, EngineConfig
from deployments.monitors.edge import RequestClass
from engine.vllm.requests import CLIENT
from scheduler.priority import BACKGROUND_PRIORITY

INTERNAL_PREFIX = "mace_"
_ARGUMENT_KEYS = frozenset({"vllm_xargs", "extra_args"})
_INTERACTIVE_TIERS = frozenset({"auto", "default", "scale", "priority", "fast"})
_BACKGROUND_TIERS = frozenset({"flex", "batch"})
_VLLM_TIERS = {"batch": "flex", "fast": "priority"}
"""Tiers under a name that vLLM's models take."""

_PRIORITY_HEADER = b"x-vllm-priority"
_FIELD_PATHS = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/invocations"}
)
"""Routes whose requests have a `priority` field."""
_READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_TOKEN_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_HEADER_PATHS = frozenset({"/v1/messages"})
"""Routes whose requests have none; vLLM reads its header there."""
GENERATING_PATHS = _FIELD_PATHS | _HEADER_PATHS
"""Routes that answer with tokens."""


async def guard(request: ClientRequest, go_on: GoOn) -> None:
    """Refuse a request that must not reach vLLM."""
    check_internal_keys(request.json)
    if request.is_nested_too_deeply and not request.path.startswith("/v1/feedback"):  # whose bodies are lines
        request.required_json()
    await go_on()


def check_origin(allowed: Collection[str]) -> Step:
    """A step: refuse a change or a generation that a page of another site asks for.

    Browsers send such a page's POST of plain text without asking for leave by CORS, and name the page in `Origin`.
    They ask leave for other requests, by OPTIONS, and are told the same, with 400 as CORS has it.
    `allowed` are origins that may, `*` for all; the server's own may in any case.
    """

    async def check(request: ClientRequest, go_on: GoOn) -> None:
        headers = dict(request.headers)
        origin = headers.get(b"origin")
        asks_for_leave = b"access-control-request-method" in headers
        if origin and (asks_for_leave or request.scope["method"] not in _READING_METHODS):
            name = origin.decode("latin-1")
            if not {name, "*"} & set(allowed) and origin.rpartition(b"://")[2] != headers.get(b"host"):
                listed = "engine.frontend_kwargs.allowed_origins lists those that may"
                message = f"a page of {name[:200]} may not send this; {listed}"
                raise BadRequestError(message, status=400 if asks_for_leave else 403, reason="origin")
        await go_on()

    return check


def check_size(limits: EngineConfig) -> Step:
    """A step: refuse a request that asks for more answers or tokens than one client may have at once."""

    async def check(request: ClientRequest, go_on: GoOn) -> None:
        if request.path in _FIELD_PATHS and isinstance(request.json, dict):
            choices = num_choices(request.json)
            if choices > limits.max_choices:
                message = f"the request asks for {choices} answers; at most {limits.max_choices} are given at once"
                raise BadRequestError(message, "n", reason="choices")
            tokens = max(_whole(request.json.get(name)) for name in _TOKEN_FIELDS)
            if choices * tokens > limits.max_request_tokens:
                message = (
                    f"{choices} times {tokens} tokens are more than the {limits.max_request_tokens} of a request"
                )
                raise BadRequestError(message, "max_tokens", reason="request_tokens")
        await go_on()

    return check


def num_choices(body: dict[str, Any]) -> int:
    """Answers that the body of a generating route asks for: its prompts times `n`, or `best_of`."""
    num_prompts = 1
    for name in ("prompt", "messages"):  # a list of texts, of token lists, or of conversations
        items = body.get(name)
        if isinstance(items, list) and items and isinstance(items[0], (str, list)):
            num_prompts = len(items)
    return num_prompts * max(1, _whole(body.get("n")), _whole(body.get("best_of")))


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


async def note_client(request: ClientRequest, go_on: GoOn) -> None:
    """Tell the engine who asks, so that clients take turns: the `user` of the body, or else the connection."""
    user = request.json.get("user") if isinstance(request.json, dict) else None
    client = user if isinstance(user, str) and user else ":".join(map(str, request.scope.get("client") or ()))
    CLIENT.set(client or None)
    await go_on()


async def give_own_id(request: ClientRequest, go_on: GoOn) -> None:
    """Give the request an id of ours, from which vLLM makes the answer's, in place of what the client sent.

    Feedback names answers by their ids, so no two may be equal, however often a client sends the same one.
    """
    own_id, body_id = new_request_id(), None
    request.client_id = dict(request.headers).get(b"x-request-id", b"").decode("latin-1") or None
    request.set_header(b"x-request-id", own_id.encode())
    if isinstance(request.json, dict):
        body_id = request.json.get("request_id")
        request.client_id = request.client_id or (body_id[:MAX_ID_CHARS] if isinstance(body_id, str) else None)
        if request.path == "/v1/responses":  # it knows the field only, and takes it as it is
            request.set_fields(request_id=f"resp_{own_id}")
        elif body_id is not None:
            request.set_fields(request_id=own_id)
    await go_on()


async def set_request_class(request: ClientRequest, go_on: GoOn) -> None:
    """Set `priority` from `service_tier`, in the body or, where that has no such field, in the header.

    Raises:
        BadRequestError: a `service_tier` that does not exist, on a route that generates.
    """
    tier = request.json.get("service_tier") if isinstance(request.json, dict) else None
    if tier is not None and request.path in _FIELD_PATHS:
        _check_tier(tier, _INTERACTIVE_TIERS | _BACKGROUND_TIERS)
        changes: dict[str, Any] = {"service_tier": _VLLM_TIERS[tier]} if tier in _VLLM_TIERS else {}
        if tier in _BACKGROUND_TIERS:
            changes["priority"] = request.json.get("priority", BACKGROUND_PRIORITY)
        if changes:
            request.set_fields(**changes)
    elif tier is not None and request.path in _HEADER_PATHS:
        _check_tier(tier, _INTERACTIVE_TIERS | _BACKGROUND_TIERS | {"standard_only"})
        if tier in _BACKGROUND_TIERS and not any(name.lower() == _PRIORITY_HEADER for name, _ in request.headers):
            request.set_header(_PRIORITY_HEADER, str(BACKGROUND_PRIORITY).encode())
    await go_on()


def class_of(request: ClientRequest) -> RequestClass:
    """The class of a request that passed `set_request_class`."""
    priority = request.field("priority")
    if request.path in _HEADER_PATHS:
        header = next((value.strip() for name, value in request.headers if name.lower() == _PRIORITY_HEADER), b"")
        priority = int(header) if header.isdigit() else 0
    return "background" if isinstance(priority, int) and priority > 0 else "interactive"


def check_internal_keys(value: Any) -> None:
    """Refuse `vllm_xargs` and `extra_args`, at any depth, that carry a key of ours, with a BadRequestError."""
    stack = [value]
    while stack:
        current = stack.pop()
        if isinstance(current, dict):
            for name in _ARGUMENT_KEYS & current.keys():
                arguments = current[name]
                for key in arguments if isinstance(arguments, dict) else ():
                    _check_argument(name, key, arguments[key])
            stack.extend(current.values())
        elif isinstance(current, list):
            stack.extend(current)


def _check_argument(name: str, key: str, value: Any) -> None:
    if key == KV_PRUNING_OPT_OUT and not isinstance(value, bool):
        message = f"{name}: {KV_PRUNING_OPT_OUT} is true or false, not {value!r}"
    elif key.strip().lower().startswith(INTERNAL_PREFIX):
        message = f"{name} may not carry {key!r}: keys with {INTERNAL_PREFIX} are internal"
    else:
        return
    raise BadRequestError(message, name, reason="internal_key")


def _check_tier(tier: Any, known: frozenset[str]) -> None:
    if not isinstance(tier, str) or tier not in known:
        message = f"service_tier {tier!r} does not exist; there are {', '.join(sorted(known))}"
        raise BadRequestError(message, "service_tier", reason="service_tier")
