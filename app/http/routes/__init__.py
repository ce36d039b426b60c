"""Routers that MACE adds to the OpenAI-compatible application of vLLM, and what they need of a request."""

from typing import Annotated, Any

from fastapi import Depends, Request

from app.http.errors import BadRequestError
from app.http.request import REQUEST_KEY
from deployments.executor import Executor


def _executor(request: Request) -> Any:
    return request.app.state.executor


async def _json_body(request: Request) -> Any:  # async: no hop to a thread
    return request.scope[REQUEST_KEY].required_json()


async def check_query(request: Request) -> None:
    """Refuse query parameters that the route does not have: who sends one means something by it."""
    known = {one.alias for one in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            allowed = f"there are {', '.join(sorted(known))}" if known else "this route has none"
            raise BadRequestError(f"unknown query parameter {name[:64]!r}; {allowed}", name[:64], reason="query")


ExecutorOf = Annotated[Executor, Depends(_executor)]
"""The executor behind the application."""
JsonBody = Annotated[Any, Depends(_json_body)]
"""The request's JSON; a BadRequestError if it has none."""
