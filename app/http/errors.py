"""Our errors as OpenAI-shaped JSON: `{"error": {"message", "type", "param", "code"}}`."""

import json
import traceback
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from core.errors import (
    AdapterError,
    ConflictError,
    ControlUnavailableError,
    DamagedAdapterError,
    EngineUnavailableError,
    FeedbackError,
    InvalidFeedbackError,
    MaceError,
    ResponseNotReadyError,
    StoreUnavailableError,
    UnknownResponseError,
    UnknownVersionError,
)

_STATUS: dict[type[MaceError], int] = {
    InvalidFeedbackError: 422,
    UnknownResponseError: 404,
    ResponseNotReadyError: 409,
    FeedbackError: 400,
    ConflictError: 409,
    StoreUnavailableError: 503,
    ControlUnavailableError: 503,
    EngineUnavailableError: 503,
    UnknownVersionError: 404,
    DamagedAdapterError: 409,
    AdapterError: 503,
}
_RETRY_AFTER_S = 2


class BadRequestError(MaceError):
    """The request itself is wrong, whatever it is about; `reason` is the metric's label."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, reason: str = "bad_request"
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.reason = reason


class ServerStoppingError(MaceError):
    """The server is being stopped; another one, or the next, can take the request."""

    def __init__(self) -> None:
        super().__init__("the server is stopping; send the request again in a moment")


def status_of(error: MaceError) -> int:
    """HTTP status of one of our errors: what the nearest of its classes has."""
    if isinstance(error, BadRequestError):
        return error.status
    if isinstance(error, ServerStoppingError):
        return 503
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)


def error_body(message: str, kind: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The JSON that OpenAI clients understand."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(error: MaceError) -> JSONResponse:
    """The response for one of our errors; 503 says when to try again."""
    status = status_of(error)
    body = error_body(str(error), type(error).__name__, status, getattr(error, "param", None))
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse(body, status, headers)


def error_event(error: MaceError) -> bytes:
    """The last event of a stream that cannot go on, in a form that clients of chat, responses and messages all read."""
    body = error_body(str(error), type(error).__name__, status_of(error))
    return f"event: error\ndata: {json.dumps({'type': 'error', **body})}\n\n".encode()


def install_error_handlers(app: FastAPI) -> None:
    """Answer every `MaceError` that a route raises, and what the framework refuses (404, 405, unreadable JSON)."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, MaceError)
        return error_response(error)

    async def answer_framework(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        return JSONResponse(
            error_body(str(error.detail), phrase, error.status_code), error.status_code, error.headers
        )

    async def answer_validation(_: Request, error: Exception) -> JSONResponse:
        if not any("/pydantic/" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            raise error
        message = f"the body is not what this route takes: {type(error).__name__}: {error}"
        return error_response(BadRequestError(message))

    app.add_exception_handler(MaceError, answer)
    app.add_exception_handler(HTTPException, answer_framework)
    for kind in (AttributeError, KeyError, IndexError, RecursionError):  # from vLLM's validators, for odd values
        app.add_exception_handler(kind, answer_validation)
    app.middleware_stack = app.build_middleware_stack()  # vLLM has built it already, without our handler
