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

from typing import Any

from app.http.errors import BadRequestError
from app.http.request import ClientRequest, GoOn
from core.config import KV_PRUNING_OPT_OUT
from scheduler.priority import BACKGROUND_PRIORITY

INTERNAL_PREFIX = "mace_"
_ARGUMENT_KEYS = frozenset({"vllm_xargs", "extra_args"})
_INTERACTIVE_TIERS = frozenset({"auto", "default", "scale", "priority", "fast"})
_BACKGROUND_TIERS = frozenset({"flex", "batch"})
_VLLM_TIERS = {"batch": "flex", "fast": "priority"}
"""Tiers under a name that vLLM's models take."""

_PRIORITY_HEADER = b"x-vllm-priority"
_FIELD_PATHS = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"}
)
"""Routes whose requests have a `priority` field."""
_HEADER_PATHS = frozenset({"/v1/messages"})
"""Routes whose requests have none; vLLM reads its header there."""


async def guard(request: ClientRequest, go_on: GoOn) -> None:
    """Refuse a request that must not reach vLLM."""
    check_internal_keys(request.json)
    check_prompt_logprobs(request.json)
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
            message = "prompt_logprobs cannot be computed while adapters are served"
            raise BadRequestError(message, "prompt_logprobs", reason="prompt_logprobs")
        if part.get("echo") and part.get("logprobs") is not None:
            message = "echo with logprobs asks for those of the prompt, which no server of adapters can compute"
            raise BadRequestError(message, "echo", reason="prompt_logprobs")


def _check_tier(tier: Any, known: frozenset[str]) -> None:
    if not isinstance(tier, str) or tier not in known:
        message = f"service_tier {tier!r} does not exist; there are {', '.join(sorted(known))}"
        raise BadRequestError(message, "service_tier", reason="service_tier")
