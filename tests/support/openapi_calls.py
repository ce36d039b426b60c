"""Random calls of everything that an OpenAPI document lists, and what in the answers the document does not."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import httpx

_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 10**20, 1.5, "", "x", "mace-tiny", "mace-tiny@base", "none", "\u0000", "é" * 300, [], [0], ["x"],
    [{}], {}, {"a": {"b": []}}, [{"role": "user", "content": "hi"}], {"type": "json_object"},
)  # fmt: skip
_BODIES = (b"", b" ", b"{", b"null", b"[]", b"3", b'"x"', b"\xff", b"[" * 5000, b'{"a": "\\ud800"}')
_HEADERS: tuple[dict[str, str], ...] = (
    {}, {}, {}, {}, {"Content-Encoding": "gzip"}, {"X-Request-Id": "x" * 300}, {"Content-Type": "text/plain"},
    {"Idempotency-Key": "x" * 300}, {"Accept": "text/event-stream"}, {"X-Vllm-Priority": "x"},
)  # fmt: skip
_USEFUL = {
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "input": "hi",
    "chosen": "a",
    "rejected": "b",
    "max_tokens": 1,
    "max_output_tokens": 16,
}


def undocumented(
    call: Callable[..., httpx.Response], document: dict[str, Any], calls_each: int, seed: int
) -> Iterator[str]:
    """A line for each answer whose status, content type or form of error the document does not have."""
    draw = random.Random(seed)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for _ in range(calls_each):
                options = _options(draw, method, operation, document)
                reply = call(method.upper(), _filled(draw, path, method), **options)
                if complaint := _complaint(reply, operation):
                    yield f"{method} {reply.request.url}: {complaint}; sent {str(options)[:300]}; {reply.text[:200]}"
        reply = call("PATCH", _filled(draw, path, "patch"))
        if path != "/metrics" and (reply.status_code not in (404, 405) or not _is_error(reply)):
            yield f"PATCH {path}: {reply.status_code} {reply.text[:200]}"


def _filled(draw: random.Random, path: str, method: str) -> str:
    """With names in its place holders; of those that exist only where nothing is changed."""
    names = (
        "v9999",
        "x",
        "..",
        "%00",
        "é",
        "x" * 300,
        *(("v0001", "base", "mace-tiny") if method == "get" else ()),
    )
    while "{" in path:
        head, _, tail = path.partition("{")
        path = head + draw.choice(names) + tail.partition("}")[2]
    return path


def _options(
    draw: random.Random, method: str, operation: dict[str, Any], document: dict[str, Any]
) -> dict[str, Any]:
    names = [one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"]
    options: dict[str, Any] = {"headers": {"Content-Type": "application/json", **draw.choice(_HEADERS)}}
    options["params"] = {
        name: draw.choice(("", "x", "1", "-1", "trl", "1e9")) for name in [*names, "nobody"] if draw.random() < 0.3
    }
    if method == "post":
        options["content"] = draw.choice(_BODIES) if draw.random() < 0.2 else _body(draw, operation, document)
    return options


def _body(draw: random.Random, operation: dict[str, Any], document: dict[str, Any]) -> bytes:
    content = operation.get("requestBody", {}).get("content", {})
    schema = next(iter(content.values()), {}).get("schema", {})
    properties: set[str] = set()
    for one in [schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        name = one.get("$ref", "").rpartition("/")[2]
        properties |= set((document["components"]["schemas"].get(name) or one).get("properties", ()))
    known = sorted(properties or {"items", "type", "response_id", "value", "prompt", "chosen", "rejected"})
    body = {name: value for name, value in _USEFUL.items() if name in known and draw.random() < 0.9}
    body |= {draw.choice(known): draw.choice(_VALUES) for _ in range(draw.randrange(3))}
    return json.dumps(body).encode()


def _complaint(reply: httpx.Response, operation: dict[str, Any]) -> str:
    described = operation["responses"].get(str(reply.status_code))
    if described is None:
        return f"status {reply.status_code} is not documented"
    kind = reply.headers.get("content-type", "").partition(";")[0]
    kinds = [name.partition(";")[0] for name in described.get("content", ())]
    if kinds and kind not in kinds:
        return f"content type {kind!r} is not among {kinds}"
    if reply.status_code >= 400 and not _is_error(reply):
        return "the error has another form"
    return "" if reply.status_code < 500 or reply.status_code in (501, 503) else f"status {reply.status_code}"


def _is_error(reply: httpx.Response) -> bool:
    try:
        return {"message", "type", "param", "code"} <= reply.json()["error"].keys()
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
