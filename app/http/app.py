"""The HTTP application of an executor: vLLM's own, with our routes first and the chain of our steps outside."""

import asyncio
from collections.abc import Collection

from fastapi import Depends, FastAPI
from starlette.types import ASGIApp

from app.http.canary import CanaryRouter
from app.http.capture import ResponseCapture
from app.http.edge import measure_edge
from app.http.errors import BadRequestError, install_error_handlers
from app.http.guard import check_origin, check_size, give_own_id, guard, note_client, set_request_class
from app.http.openapi import document_errors
from app.http.request import ClientRequest, GoOn, RequestChain, Step
from app.http.routes import check_query, feedback, training, versions
from core.errors import EngineUnavailableError, MaceError
from deployments.executor import Executor
from deployments.monitors.metrics import Meter
from deployments.publishing.versions import AdapterVersions
from deployments.routing.prefix_index import note_request
from deployments.routing.prefix_names import TextPrefixes
from engine.vllm.engine import AWAY
from engine.vllm.served_prompts import ServedPrompts

_REMOVED_PATHS = frozenset(
    {
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/inference/v1/generate",  # takes raw sampling parameters
        "/inference/v1/abort_requests",
        "/kv_event_sources",  # internal addresses
        "/health",  # ours says that the process lives, also while the engine is away
        "/v1/models",  # ours knows about the live version
    }
)


def attach_routes(app: FastAPI, executor: Executor) -> ASGIApp:
    """Add MACE to vLLM's application; returns the ASGI application to serve."""
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", "") not in _REMOVED_PATHS
    ]
    vllm_paths = {getattr(route, "path", "") for route in app.router.routes}
    need_engine = NeedEngine(
        executor,
        {getattr(route, "path", "") for route in app.router.routes if "POST" in getattr(route, "methods", ())},
    )
    executor.lose_requests = need_engine.lose_requests
    app.state.executor = executor
    install_error_handlers(app)
    for module in (feedback, versions, training):
        app.include_router(module.router, dependencies=[Depends(check_query)])
    document_errors(app)
    model_id, meter = executor.args.model.model_id, Meter("http")
    steps: list[Step] = [
        guard,  # first: nothing else looks at a request that must not come in
        need_engine,
        check_origin(executor.args.engine.frontend_kwargs.get("allowed_origins", ())),
        check_size(executor.args.engine),
        note_client,
        give_own_id,
        set_request_class,  # refuses too, so it stands before whatever counts or draws a request
        measure_edge(executor.edge),  # after the class is set; its times begin where the request came in
        prefix_names(model_id),  # before the canary's draw: it notes what the client asks for
        CanaryRouter(executor.trial, model_id),  # draws after what the client asked for is noted
        keep_version(executor.versions, vllm_paths),  # after the draw: it knows which version was asked for
        ResponseCapture(
            executor.responses.add, ServedPrompts(app)
        ),  # last: only what vLLM itself answered is kept
    ]
    chain = RequestChain(
        app,
        steps,
        executor.args.feedback.max_body_bytes,
        lambda reason: meter.count("requests_refused", reason=reason),
    )
    executor.end_requests = chain.close
    return chain


class NeedEngine:
    """A step: while the engine is away a request to one of `paths` is refused at once, and at its death cut off."""

    def __init__(self, executor: Executor, paths: Collection[str]) -> None:
        self._executor = executor
        self._paths = paths
        self._open: set[ClientRequest] = set()
        self._cuts: dict[ClientRequest, asyncio.Task[None]] = {}

    async def __call__(self, request: ClientRequest, go_on: GoOn) -> None:
        """Pass the request on if the engine can take it."""
        if request.path not in self._paths:
            await go_on()
            return
        if not self._executor.can_serve:
            raise EngineUnavailableError(AWAY)
        self._open.add(request)
        try:
            await go_on()
        finally:
            self._open.discard(request)
            if (cut := self._cuts.pop(request, None)) is not None:
                await cut  # the server takes nothing more once the application has returned

    def lose_requests(self, error: MaceError) -> None:
        """End the answers under way with an error, before vLLM can say anything of its own."""
        for request in self._open:
            self._cuts[request] = asyncio.ensure_future(request.cut(error))


def prefix_names(model_id: str) -> Step:
    """A step: `PrefixIndex` learns the names of a request's prefixes, and whether it asks for the live model."""

    async def note(request: ClientRequest, go_on: GoOn) -> None:
        note_request(TextPrefixes.from_headers(request.headers), asks_live=request.asks_for(model_id))
        await go_on()

    return note


def keep_version(versions: AdapterVersions, paths: Collection[str]) -> Step:
    """A step: the version that a request asks for stays until it has ended; a name that does not exist is refused.

    `paths` are the routes whose body names a model.
    """

    async def keep(request: ClientRequest, go_on: GoOn) -> None:
        model = request.model if request.path in paths else None
        if not isinstance(model, str) or not model:
            await go_on()
            return
        if not versions.has_name(model):
            names = ", ".join(card["id"] for card in versions.cards())
            message = f"The model `{model[:200]}` does not exist. There are {names}."
            raise BadRequestError(message, "model", status=404, reason="unknown_model")
        with versions.kept(model):
            await go_on()

    return keep
