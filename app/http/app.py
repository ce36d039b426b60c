"""The HTTP application of an executor: vLLM's own, with our routes first and our middleware outside."""

from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from app.http.canary_router import CanaryRouter
from app.http.capture import ResponseCapture
from app.http.errors import install_error_handlers
from app.http.guard import RequestGuard
from app.http.prefix_context import PrefixContext
from app.http.routes import adapters, drift, feedback, health, models, training
from deployments.executor import Executor
from deployments.monitors.metrics import Meter

_REMOVED_PATHS = frozenset(
    {
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/inference/v1/generate",  # takes raw sampling parameters
        "/inference/v1/abort_requests",
        "/invocations",  # an alias that the response store would not see
        "/v1/models",  # ours knows about the live version
    }
)


def attach_routes(app: FastAPI, executor: Executor) -> ASGIApp:
    """Add MACE to vLLM's application; returns the ASGI application to serve."""
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", "") not in _REMOVED_PATHS
    ]
    app.state.executor = executor
    install_error_handlers(app)
    for module in (feedback, adapters, training, drift, models, health):
        app.include_router(module.router)
    meter = Meter("http")
    capture = ResponseCapture(app, executor.responses.add)
    canary = CanaryRouter(capture, executor.trial, executor.args.model.model_id)
    return RequestGuard(
        _Lifespan(PrefixContext(canary, executor.args.model.model_id), app),
        executor.args.feedback.max_body_bytes,
        lambda reason: meter.count("requests_refused", reason=reason),
    )


class _Lifespan:
    """Sends the server's lifespan events straight to the application, past the middleware."""

    def __init__(self, middleware: ASGIApp, app: ASGIApp) -> None:
        self._middleware = middleware
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await (self._middleware if scope["type"] == "http" else self._app)(scope, receive, send)
