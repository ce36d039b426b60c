"""The HTTP application of an executor: vLLM's own, with our routes first and the chain of our steps outside."""

from fastapi import FastAPI
from starlette.types import ASGIApp

from app.http.canary import CanaryRouter
from app.http.capture import ResponseCapture
from app.http.errors import install_error_handlers
from app.http.guard import check_size, give_own_id, guard, note_client, set_request_class
from app.http.openapi import document_errors
from app.http.request import ClientRequest, GoOn, RequestChain, Step
from app.http.routes import feedback, training, versions
from deployments.executor import Executor
from deployments.monitors.metrics import Meter
from deployments.routing.prefix_index import note_request
from deployments.routing.prefix_names import TextPrefixes

_REMOVED_PATHS = frozenset(
    {
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/inference/v1/generate",  # takes raw sampling parameters
        "/inference/v1/abort_requests",
        "/kv_event_sources",  # internal addresses
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
    for module in (feedback, versions, training):
        app.include_router(module.router)
    document_errors(app)
    model_id, meter = executor.args.model.model_id, Meter("http")
    steps: list[Step] = [
        guard,  # first: nothing else looks at a request that must not come in
        check_size(executor.args.engine),
        note_client,
        give_own_id,
        set_request_class,  # refuses too, so it stands before whatever counts or draws a request
        prefix_names(model_id),  # before the canary's draw: it notes what the client asks for
        CanaryRouter(executor.trial, model_id),  # draws after what the client asked for is noted
        ResponseCapture(executor.responses.add),  # last: only what vLLM itself answered is kept
    ]
    chain = RequestChain(
        app,
        steps,
        executor.args.feedback.max_body_bytes,
        lambda reason: meter.count("requests_refused", reason=reason),
    )
    executor.end_requests = chain.close
    return chain


def prefix_names(model_id: str) -> Step:
    """A step: `PrefixIndex` learns the names of a request's prefixes, and whether it asks for the live model."""

    async def note(request: ClientRequest, go_on: GoOn) -> None:
        note_request(TextPrefixes.from_headers(request.headers), asks_live=request.asks_for(model_id))
        await go_on()

    return note
