"""The OpenAPI document of the whole application: what FastAPI writes, and the errors that every route can answer."""

from typing import Any

from fastapi import FastAPI

from app.http.errors import error_body

JSONL = "application/x-ndjson"
JSON_OBJECT = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
"""`openapi_extra` of a route that reads its JSON itself."""
JSON_LINES = {"requestBody": {"required": True, "content": {JSONL: {"schema": {"type": "string"}}}}}

_FEEDBACK = "/v1/feedback"
_OPERATIONS = frozenset({"get", "post", "put", "patch", "delete"})
_MEANINGS = {
    400: "The request is malformed, or a parameter is out of range",
    403: "A page of another site sends this, and its origin is not allowed",
    404: "Something that the request names does not exist",
    409: "Not in this state",
    413: "The body is too large",
    415: "The body is compressed or not of the expected type",
    422: "A record is refused; `param` names the key",
    500: "The server failed on this request",
    503: "Not now; `Retry-After` says when to try again",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": [*error_body("", "", 0)["error"]],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["integer", "string", "null"]},
            },
        }
    },
}


def document_errors(app: FastAPI) -> None:
    """Let `app` describe, for each operation, the errors that the request chain and our handlers answer."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = build()
            document.setdefault("components", {}).setdefault("schemas", {})["Error"] = _ERROR
            for path, operations in document["paths"].items():
                for method in _OPERATIONS & operations.keys():
                    _add_errors(path, method, operations[method]["responses"])
        return build()

    app.openapi = openapi  # type: ignore[method-assign]


def _add_errors(path: str, method: str, responses: dict[str, Any]) -> None:
    for status in _statuses(path, method) | {int(key) for key in responses if key in map(str, _MEANINGS)}:
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        responses[str(status)] = {"description": _MEANINGS[status], "content": content}
    if not path.startswith(_FEEDBACK):
        responses.pop("422", None)  # FastAPI's; with vLLM's handler that is a 400


def _statuses(path: str, method: str) -> set[int]:
    statuses = {400, 500, 503}
    if "{" in path or method == "post":
        statuses |= {404}
    if method != "get":
        statuses |= {403}
    if method == "post":
        statuses |= {413}
    if path.startswith(_FEEDBACK):
        statuses |= {422}
    return statuses | {415}
