"""What routes need from the application they are attached to."""

import json
from typing import Annotated, Any

from fastapi import Depends, Request

from app.http.errors import BadRequestError
from deployments.executor import Executor


def get_executor(request: Request) -> Executor:
    """The executor behind this application."""
    executor: Executor = request.app.state.executor
    return executor


ExecutorOf = Annotated[Executor, Depends(get_executor)]


async def json_body(request: Request) -> Any:
    """The request's JSON.

    Raises:
        BadRequestError: empty or malformed, with the position.
    """
    body = await request.body()
    if not body.strip():
        raise BadRequestError("the request body is empty; JSON is expected")
    try:
        return json.loads(body)
    except RecursionError:
        raise BadRequestError("the request body is nested too deeply") from None
    except ValueError as error:
        raise BadRequestError(f"the request body is no JSON: {error}") from error


JsonBody = Annotated[Any, Depends(json_body)]
