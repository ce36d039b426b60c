"""Routers that MACE adds to the OpenAI-compatible application of vLLM, and what they need of a request."""

from typing import Annotated, Any

from fastapi import Depends, Request

from app.http.request import REQUEST_KEY
from deployments.executor import Executor


def _executor(request: Request) -> Any:
    return request.app.state.executor


async def _json_body(request: Request) -> Any:  # async: no hop to a thread
    return request.scope[REQUEST_KEY].required_json()


ExecutorOf = Annotated[Executor, Depends(_executor)]
"""The executor behind the application."""
JsonBody = Annotated[Any, Depends(_json_body)]
"""The request's JSON; a BadRequestError if it has none."""
