"""Sending rows to a server, or judging them here; a server that is away for a while is waited for."""

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx

from alignment.store.intake import prepare
from core.alignment_config import FeedbackConfig
from core.errors import MaceError

_TIMEOUT_S = httpx.Timeout(120.0, connect=10.0)
_AWAY = frozenset({429, 502, 503, 504})
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 30.0
_TOO_LARGE = 413


class DeliveryError(MaceError):
    """The server refuses the import as a whole, or stayed away too long."""


@dataclass(frozen=True, slots=True)
class LineRefusal:
    """Why the server refused one line of a batch."""

    index: int
    """Position in the batch, from 0."""
    reason: str
    param: str | None


@dataclass(slots=True)
class Delivered:
    """Outcome of one batch. Everything that is not refused is committed."""

    num_accepted: int
    num_duplicates: int
    refusals: list[LineRefusal]


class Sink(Protocol):
    """Where rows go."""

    def send(self, lines: Sequence[bytes]) -> Delivered:
        """Deliver JSON lines of our API; returns when each is committed or refused.

        Raises:
            DeliveryError: none of this batch may be taken as committed.
        """

    def knows(self, record_id: str) -> bool:
        """Is a record of that id stored?"""


@dataclass(eq=False, repr=False)
class Server:
    """`POST /v1/feedback/import` of a running server."""

    url: str
    headers: dict[str, str]
    """Sent with every request."""
    patience_s: float
    """Time for which one batch is tried while the server is away."""
    on_wait: Callable[[str, float], None]
    """Called with the reason and the delay in seconds before each wait."""
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self._client = httpx.Client(base_url=self.url.rstrip("/"), headers=self.headers, timeout=_TIMEOUT_S)

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def check(self) -> None:
        """Is there a server that takes imports from us?

        Raises:
            DeliveryError: nothing listens there, or it refuses us.
        """
        try:
            self._client.get("/v1/feedback", params={"limit": 1})
        except httpx.ConnectError as error:
            raise DeliveryError(f"no server at {self.url} ({error}); start one with `make serve`") from error
        except (httpx.HTTPError, httpx.InvalidURL):
            pass  # it is there but slow or busy, which `_request` waits out; or says why it cannot
        self._request("GET", "/v1/feedback", params={"limit": 1})

    def knows(self, record_id: str) -> bool:
        """See `Sink.knows`."""
        reply = self._request("GET", "/v1/feedback", {400, 404, 422}, params={"limit": 1, "after": record_id})
        return not reply.is_error

    def send(self, lines: Sequence[bytes]) -> Delivered:
        """See `Sink.send`. A batch that is too large for the server is sent in halves."""
        reply = self._request("POST", "/v1/feedback/import", {_TOO_LARGE}, content=b"\n".join(lines))
        if reply.status_code == _TOO_LARGE:
            if len(lines) == 1:
                return Delivered(0, 0, [LineRefusal(0, message_of(reply), None)])
            middle = len(lines) // 2
            first, second = self.send(lines[:middle]), self.send(lines[middle:])
            moved = [replace(one, index=one.index + middle) for one in second.refusals]
            return Delivered(
                first.num_accepted + second.num_accepted,
                first.num_duplicates + second.num_duplicates,
                first.refusals + moved,
            )
        try:
            report = reply.json()
            refusals = [
                LineRefusal(error["line_number"] - 1, error["message"], error["param"])
                for error in report["errors"]
            ]
            delivered = Delivered(report["num_accepted"], report["num_duplicates"], refusals)
        except (ValueError, KeyError, TypeError) as error:
            raise DeliveryError(f"{self.url} answered with no import report; is it a MACE server?") from error
        if delivered.num_accepted + delivered.num_duplicates + len(refusals) != len(lines):
            raise DeliveryError(f"{self.url} did not account for all {len(lines)} lines of a batch")
        return delivered

    def _request(self, method: str, path: str, taken: Collection[int] = (), **kwargs: Any) -> httpx.Response:
        """One request, repeated while the server is away. `taken` are error statuses that the caller handles."""
        give_up_s = time.monotonic() + self.patience_s
        delay_s = _FIRST_DELAY_S
        while True:
            wait_s = delay_s
            try:
                reply = self._client.request(method, path, **kwargs)
            except httpx.TransportError as error:
                reason = f"{self.url} cannot be reached ({error or type(error).__name__})"
            except httpx.InvalidURL as error:
                raise DeliveryError(f"{self.url} is no address: {error}") from error
            else:
                if reply.status_code not in _AWAY:
                    break
                reason, wait_s = message_of(reply), max(delay_s, _retry_after_s(reply))
            if time.monotonic() + wait_s > give_up_s:
                raise DeliveryError(f"gave up after {self.patience_s:.0f} s: {reason}")
            self.on_wait(reason, wait_s)
            self.sleep(wait_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)
        if reply.is_error and reply.status_code not in taken:
            raise DeliveryError(message_of(reply))
        return reply


class DryRun:
    """Judges rows as the server would, as far as that goes without its store: no ids are looked up."""

    def __init__(self) -> None:
        self._config = FeedbackConfig()

    def knows(self, record_id: str) -> bool:
        """See `Sink.knows`."""
        del record_id
        return False

    def send(self, lines: Sequence[bytes]) -> Delivered:
        """See `Sink.send`; nothing is stored, and a duplicate is not noticed."""
        refusals = []
        for index, line in enumerate(lines):
            error = prepare(json.loads(line), None, self._config).error
            if error is not None:
                refusals.append(LineRefusal(index, str(error), error.param))
        return Delivered(len(lines) - len(refusals), 0, refusals)


def _retry_after_s(reply: httpx.Response) -> float:
    """Seconds of the Retry-After header; 0 if there is none, or a date."""
    value = reply.headers.get("Retry-After", "")
    return min(float(value), 3600.0) if value.isdecimal() else 0.0


def message_of(reply: httpx.Response) -> str:
    """The message of an error reply in OpenAI's shape, or the first 200 characters of any other."""
    try:
        return f"{reply.json()['error']['message']} (HTTP {reply.status_code})"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {reply.status_code}: {reply.text[:200]}"
