"""ASGI middleware: the names of a request's prefixes, and the model it asks for, are known while it is handled."""

from starlette.types import ASGIApp, Receive, Scope, Send

from app.http.guard import BODY_KEY
from deployments.routing.prefix_index import note_request
from deployments.routing.prefix_text import TextPrefixes


class PrefixContext:
    """Must stand behind `RequestGuard`, which parses the body, and before `CanaryRouter`, which changes the model."""

    def __init__(self, app: ASGIApp, model_id: str) -> None:
        self._app = app
        self._model_id = model_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on unchanged."""
        request = scope.get(BODY_KEY)
        asked = request.get("model") if isinstance(request, dict) else None
        note_request(TextPrefixes.from_headers(scope["headers"]), asks_live=asked in (self._model_id, None))
        await self._app(scope, receive, send)
