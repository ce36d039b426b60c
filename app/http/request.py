"""One HTTP request on its way to vLLM: its body is read under the limit and parsed once, whoever looks at it.

`RequestChain` stands outside vLLM's application. It passes each request through steps (the list, in its order, is in
`app.http.app`), and then gives it to the application. A step looks at the request, may rewrite or refuse it, awaits
`go_on()` to pass it on, and then finds in `request.answer` what the client got. Nothing delays an answer on its way.
"""

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.errors import BadRequestError, error_response

REQUEST_KEY = "mace.request"
"""Key of the `ClientRequest` in the ASGI scope, for routes of ours."""

_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class Answer:
    """The answer as it went to the client; times are those of `time.perf_counter`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        """HTTP status; 0 before the answer began."""
        self.is_stream = False
        """Server-sent events."""
        self.is_complete = False
        self.num_parts = 0
        self.first_s = 0.0
        self.last_s = 0.0
        self.keeps_body = False
        """Set by a step that wants to read `body`."""
        self._parts: list[bytes] = []

    @property
    def body(self) -> bytes:
        """The answer so far; empty unless a step keeps it."""
        return b"".join(self._parts)

    async def send(self, message: Message) -> None:
        """ASGI's send for the application: forward a message, and note what it was."""
        await self._send(message)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.is_stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message.get("headers", ())
            )
        elif message["type"] == "http.response.body":
            if part := message.get("body"):
                self.last_s = time.perf_counter()
                self.first_s = self.first_s or self.last_s
                self.num_parts += 1
                if self.keeps_body:
                    self._parts.append(part)
            self.is_complete = not message.get("more_body", False)


class ClientRequest:
    """A request: the ASGI scope, the body as the client sent it, and the answer. `read` comes first."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.path: str = scope["path"]
        self.answer = Answer(send)
        self.json: Any = None
        """The JSON that the client sent, whatever was rewritten since; None if there is none."""
        self._receive = receive
        self._unread: Message | None = None
        """The message that the application receives first; None once it has."""
        self._changes: dict[str, Any] = {}
        self._json_error = "the request body is empty; JSON is expected"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers, as ASGI gives them to the application."""
        headers: list[tuple[bytes, bytes]] = self.scope["headers"]
        return headers

    async def read(self, max_bytes: int) -> None:
        """Take in the whole body, and parse it if it is JSON. A client that goes away meanwhile has sent nothing.

        Raises:
            BadRequestError: the body is larger than `max_bytes`.
        """
        if self.scope["method"] not in _METHODS_WITH_BODY:
            return
        declared = dict(self.headers).get(b"content-length", b"0")
        num_declared = int(declared) if declared.isdigit() else 0
        received, is_complete = bytearray(), False
        while not is_complete and max(num_declared, len(received)) <= max_bytes:
            message = await self._receive()
            if message["type"] != "http.request":
                self._unread = message  # the disconnect, for the application to find out
                return
            received += message.get("body", b"")
            is_complete = not message.get("more_body", False)
        if not is_complete or len(received) > max_bytes:
            text = f"the request body is larger than {max_bytes} bytes"
            raise BadRequestError(text, status=413, reason="body_too_large")
        body = bytes(received)
        self._unread = {"type": "http.request", "body": body, "more_body": False}
        self._parse(body)

    async def receive(self) -> Message:
        """ASGI's receive for the application: the body once, and then the real one, for the disconnect."""
        message, self._unread = self._unread, None
        return await self._receive() if message is None else message

    def required_json(self) -> Any:
        """The JSON that the client sent; a BadRequestError with the position if the body is empty or malformed."""
        if self._json_error:
            raise BadRequestError(self._json_error)
        return self.json

    def asks_for(self, model_id: str) -> bool:
        """Does it ask for the live model, whose name is `model_id`? A request that names no model does."""
        return isinstance(self.json, dict) and self.json.get("model") in (model_id, None)

    def set_fields(self, **fields: Any) -> None:
        """Give the application a body with these fields in place of the client's. Only for a body that is an object."""
        self._changes |= fields
        body = json.dumps({**self.json, **self._changes}).encode()
        self._unread = {"type": "http.request", "body": body, "more_body": False}
        self.set_header(b"content-length", str(len(body)).encode())

    def set_header(self, name: bytes, value: bytes) -> None:
        """Give the application this header in place of the client's; `name` is in lower case."""
        others = [(key, old) for key, old in self.headers if key.lower() != name]
        self.scope["headers"] = [*others, (name, value)]

    def _parse(self, body: bytes) -> None:
        try:
            self.json = json.loads(body)
            self._json_error = ""
        except RecursionError:
            self._json_error = "the request body is nested too deeply"
        except ValueError as error:
            if body.strip():
                self._json_error = f"the request body is no JSON: {error}"


GoOn = Callable[[], Awaitable[None]]
Step = Callable[[ClientRequest, GoOn], Awaitable[None]]


@dataclass(frozen=True, eq=False, repr=False)
class RequestChain:
    """The ASGI application that is served: `steps`, the outermost first, in front of `app`."""

    app: ASGIApp
    steps: Sequence[Step]
    max_body_bytes: int
    on_refused: Callable[[str], None]
    """Called with the reason of each refusal."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an HTTP request through the steps, or answer why not; anything else goes straight to the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = scope[REQUEST_KEY] = ClientRequest(scope, receive, send)
        try:
            await request.read(self.max_body_bytes)
            await self._take(0, request)
        except BadRequestError as error:
            self.on_refused(error.reason)
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            return  # nobody is there to be answered

    async def _take(self, number: int, request: ClientRequest) -> None:
        if number == len(self.steps):
            await self.app(request.scope, request.receive, request.answer.send)
        else:
            await self.steps[number](request, partial(self._take, number + 1, request))
