"""One HTTP request on its way to vLLM: its body is read under the limit and parsed once, whoever looks at it.

`RequestChain` stands outside vLLM's application. It passes each request through steps (the list, in its order, is in
`app.http.app`), and then gives it to the application. A step looks at the request, may rewrite or refuse it, awaits
`go_on()` to pass it on, and then finds in `request.answer` what the client got. Nothing delays an answer on its way.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.errors import BadRequestError, ServerStoppingError, error_event, error_response
from core.errors import EngineUnavailableError, MaceError

logger = logging.getLogger(__name__)

REQUEST_KEY = "mace.request"
"""Key of the `ClientRequest` in the ASGI scope, for routes of ours."""

MAX_ID_CHARS = 256
"""Of an `X-Request-Id`, as of every other name that a client gives (`alignment.records.chat.MAX_NAME_CHARS`)."""

_LEAVE_S = 1.0
"""A request whose client has left ends by itself within this time, or it is cancelled."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
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
        self.on_part: Callable[[bytes, float], None] | None = None
        """Set by a step that times the answer: called with each part of the body and the time at which it left."""
        self.keeps_body = False
        """Set by a step that wants to read `body`."""
        self._parts: list[bytes] = []
        self._is_cut = False

    @property
    def body(self) -> bytes:
        """The answer so far; empty unless a step keeps it."""
        return b"".join(self._parts)

    async def send(self, message: Message) -> None:
        """ASGI's send for the application: forward a message, and note what it was."""
        if self._is_cut:
            return
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
                if self.on_part is not None:
                    self.on_part(part, self.last_s)
            self.is_complete = not message.get("more_body", False)

    async def cut(self, error: MaceError, scope: Scope, receive: Receive) -> bool:
        """End the answer with an error, and send nothing that the application still says; was that possible?

        A stream ends with an error event. An answer of another kind that has begun goes on: its form has no place for
        an error, and cut short it would look whole.
        """
        if self.is_complete or (self.status and not self.is_stream):
            return False
        self._is_cut = True
        if self.status:
            await self._send({"type": "http.response.body", "body": error_event(error)})
        else:
            await error_response(error)(scope, receive, self._send)
        return True


class ClientRequest:
    """A request: the ASGI scope, the body as the client sent it, and the answer. `read` comes first."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.path: str = scope["path"]
        self.arrived_s = time.perf_counter()
        self.answer = Answer(send)
        self.json: Any = None
        """The JSON that the client sent, whatever was rewritten since; None if there is none."""
        self.client_id: str | None = None
        """The id that the client gave the request."""
        self._receive = receive
        self._unread: Message | None = None
        """The message that the application receives first; None once it has."""
        self._left = asyncio.Event()
        self._changes: dict[str, Any] = {}
        self.is_nested_too_deeply = False
        """The body may be JSON, but deeper than any reader goes."""
        self._json_error = "the request body is empty; JSON is expected"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers, as ASGI gives them to the application."""
        headers: list[tuple[bytes, bytes]] = self.scope["headers"]
        return headers

    async def read(self, max_bytes: int) -> None:
        """Take in the whole body, and parse it if it is JSON. A client that goes away meanwhile has sent nothing.

        Raises:
            BadRequestError: the body is larger than `max_bytes`, compressed, or holds text that is no Unicode; or the
                client's id is none.
        """
        self._check_headers()
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
        if message is not None:
            return message
        incoming, left = asyncio.ensure_future(self._receive()), asyncio.ensure_future(self._left.wait())
        try:
            done, _ = await asyncio.wait((incoming, left), return_when=asyncio.FIRST_COMPLETED)
            return incoming.result() if incoming in done else {"type": "http.disconnect"}
        finally:
            incoming.cancel()
            left.cancel()

    def leave(self) -> None:
        """Note that the client has gone away; the application receives a disconnect."""
        self._left.set()

    async def cut(self, error: MaceError) -> None:
        """End the answer with an error, if `Answer.cut` can, and the application's work with it."""
        if await self.answer.cut(error, self.scope, self._receive):
            self.leave()

    def required_json(self) -> Any:
        """The JSON that the client sent; a BadRequestError with the position if the body is empty or malformed."""
        if self._json_error:
            raise BadRequestError(self._json_error)
        return self.json

    @property
    def model(self) -> Any:
        """The `model` that the application gets, whatever the client wrote there; None if there is none."""
        return self.field("model")

    def field(self, name: str) -> Any:
        """A field of the body that the application gets; None if there is none."""
        return self._changes.get(name, self.json.get(name)) if isinstance(self.json, dict) else None

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

    def _check_headers(self) -> None:
        headers = dict(self.headers)
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"identity", b""):
            text = f"Content-Encoding {encoding.decode('latin-1')!r} is not supported: send the body as it is"
            raise BadRequestError(text, status=415, reason="content_encoding")
        client_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if len(client_id) > MAX_ID_CHARS or not (client_id.isascii() and client_id.isprintable()):
            text = f"X-Request-Id is at most {MAX_ID_CHARS} printable ASCII characters"
            raise BadRequestError(text, "X-Request-Id", reason="request_id")

    def _parse(self, body: bytes) -> None:
        try:
            self.json = json.loads(body)
            self._json_error = ""
            if _SURROGATE.search(body):
                json.dumps(self.json, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            text = f"the request body holds \\u{ord(error.object[error.start]):04x}, which is half of a character"
            raise BadRequestError(text, reason="surrogate") from error
        except RecursionError:
            self.is_nested_too_deeply = True
            self._json_error = "the request body is nested too deeply"
        except ValueError as error:
            if body.strip():
                self._json_error = f"the request body is no JSON: {error}"


GoOn = Callable[[], Awaitable[None]]
Step = Callable[[ClientRequest, GoOn], Awaitable[None]]


@dataclass(eq=False, repr=False)
class RequestChain:
    """The ASGI application that is served: `steps`, the outermost first, in front of `app`."""

    app: ASGIApp
    steps: Sequence[Step]
    max_body_bytes: int
    on_refused: Callable[[str], None]
    """Called with the reason of each refusal."""
    _open: dict[asyncio.Future[None], ClientRequest] = field(default_factory=dict, init=False)
    _is_closed: bool = field(default=False, init=False)

    async def close(self) -> None:
        """Take no further request, and end those that are under way with an error; returns when they have ended."""
        self._is_closed = True
        work = dict(self._open)
        await asyncio.gather(*(request.cut(ServerStoppingError()) for request in work.values()))
        if work:
            await asyncio.wait(work, timeout=_LEAVE_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an HTTP request through the steps, or answer why not; anything else goes straight to the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = scope[REQUEST_KEY] = ClientRequest(scope, receive, send)
        try:
            await request.read(self.max_body_bytes)
            if self._is_closed:
                raise ServerStoppingError
            await self._run(request)
        except BadRequestError as error:
            self.on_refused(error.reason)
            await error_response(error)(scope, receive, send)
        except (ServerStoppingError, EngineUnavailableError) as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            return  # nobody is there to be answered
        except Exception:  # the fault is ours, and the client is told so in the form of all errors
            logger.exception("%s %s failed", scope["method"], request.path)
            failure = MaceError("the server failed on this request; its log says why")
            if not await request.answer.cut(failure, scope, receive):
                raise  # in the middle of such an answer there is nothing to say but that it breaks off

    async def _run(self, request: ClientRequest) -> None:
        """Take the steps; where Serve cancels the call, because the client has left, end what they have begun.

        vLLM's routes wait for a disconnect beside a task of their own, which outlives a cancelled wait: the request
        would run to its end for nobody. So they are told of the disconnect, as they are without Serve.
        """
        work = asyncio.ensure_future(self._take(0, request))
        self._open[work] = request
        work.add_done_callback(self._open.pop)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            request.leave()
            await asyncio.wait((work,), timeout=_LEAVE_S)
            work.cancel()
            raise

    async def _take(self, number: int, request: ClientRequest) -> None:
        if number == len(self.steps):
            await self.app(request.scope, request.receive, request.answer.send)
        else:
            await self.steps[number](request, partial(self._take, number + 1, request))
