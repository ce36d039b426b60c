"""`/v1/feedback`: preferences, ratings, corrections and comments. 2xx means committed."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse

import core.errors
from alignment.records.json_checks import unique_object
from alignment.records.lines import whole_problem_of_lines
from app.http.errors import BadRequestError, error_body, status_of
from app.http.openapi import JSON_LINES, JSON_OBJECT, JSONL
from app.http.routes import ExecutorOf, JsonBody
from core.errors import InvalidFeedbackError, MaceError
from deployments.control.client import ControlClient

router = APIRouter(prefix="/v1/feedback", tags=["feedback"])


@router.post("", status_code=202, openapi_extra=JSON_OBJECT, responses={409: {}})
async def post_feedback(
    executor: ExecutorOf,
    request: Request,
    body: JsonBody,
    idempotency_key: Annotated[str | None, Header(alias="Idempotency-Key")] = None,
) -> JSONResponse:
    """Take one record, or `{"items": [...]}`; in a list, each item has its own outcome."""
    json.loads(
        await request.body(), object_pairs_hook=unique_object
    )  # what is parsed already has the last of two keys
    if not isinstance(body, dict):
        raise BadRequestError('the body must be one feedback object, or {"items": [...]}')
    is_list = "items" in body
    if is_list and (len(body) > 1 or not isinstance(body["items"], list)):
        raise BadRequestError('a list of feedback is {"items": [...]} and nothing else', "items")
    items = body["items"] if is_list else [body]
    if not items:
        raise BadRequestError("items is empty", "items")
    await executor.responses.flush()  # so that the ids we just gave out are known
    outcomes = await executor.control.add_feedback(items, idempotency_key)
    if is_list:
        return JSONResponse({"object": "list", "data": [_outcome(outcome) for outcome in outcomes]}, 202)
    if outcomes[0]["status"] == "error":
        return JSONResponse(_outcome(outcomes[0]), _status(outcomes[0]))
    return JSONResponse(_outcome(outcomes[0]), 202)


@router.get("")
async def list_feedback(
    executor: ExecutorOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    type: str | None = None,
) -> dict[str, Any]:
    """Stored records in order of arrival; go on with `after=<last id>` while `has_more`."""
    page = await executor.control.feedback_page(after, limit, type)
    return {"object": "list", "data": page["entries"], "has_more": page["has_more"]}


@router.get(
    "/export",
    response_class=StreamingResponse,
    responses={200: {"content": {JSONL: {"schema": {"type": "string"}}}}},
)
async def export_feedback(executor: ExecutorOf, format: Literal["trl", "openai"] = "trl") -> StreamingResponse:
    """All preference pairs as JSONL."""
    first = await executor.control.export_chunk(format, 0)  # an unavailable store is a 503, not a broken stream
    return StreamingResponse(_export(executor.control, format, *first), media_type=JSONL)


@router.post("/import", status_code=202, openapi_extra=JSON_LINES)
async def import_feedback(executor: ExecutorOf, request: Request, dry_run: bool = False) -> dict[str, Any]:
    """Take a JSONL body (TRL or OpenAI DPO rows, detected line by line); reports refused lines with reasons.

    With `dry_run` the report is the same, and nothing is stored.
    """
    body = await request.body()
    if not body.strip():
        raise BadRequestError("the request body is empty; JSONL is expected")
    if problem := whole_problem_of_lines(body):
        raise InvalidFeedbackError(problem)
    return await executor.control.import_feedback(body, dry_run)


def _outcome(outcome: dict[str, Any]) -> dict[str, Any]:
    if outcome["status"] != "error":
        return {"id": outcome["id"], "status": outcome["status"], "pair_id": outcome["pair_id"]}
    error = error_body(outcome["message"], outcome["error_type"], _status(outcome), outcome["param"])
    return {"id": outcome["id"], "status": "error", **error}


def _status(outcome: dict[str, Any]) -> int:
    kind: type[MaceError] = getattr(core.errors, outcome["error_type"], InvalidFeedbackError)
    return status_of(kind(outcome["message"]))


async def _export(
    control: ControlClient, format: Literal["trl", "openai"], rows: list[dict[str, Any]], cursor: int | None
) -> AsyncIterator[bytes]:
    """The rows as lines of JSON, and those from the cursor on; None is the end."""
    while True:
        yield b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        if cursor is None:
            return
        rows, cursor = await control.export_chunk(format, cursor)
