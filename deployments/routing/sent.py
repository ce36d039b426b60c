"""A request router's own books: what it sent to each replica, until the replica's reports tell.

Times are those of the router's clock, the wall clock.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Collection, Hashable
from dataclasses import dataclass

from deployments.routing.prefix_names import TextPrefixes

_MAX_OPEN = 4096
"""Requests that are not answered yet; beyond them, the oldest counts until its replica's next report."""
_BELIEVED_S = 3.0
"""A report reaches the routers within two periods; what it does not name by then is not in the cache."""
_MAX_NAMES = 65_536


@dataclass(slots=True)
class Booking:
    """One request. A replica is booked when it is proposed, so that the next request of a burst counts it."""

    replica_id: Hashable
    sent_s: float
    num_tokens: int
    """Prompt tokens that it computes, as far as known; 0 once the request went elsewhere or was answered."""


class Bookings:
    """Requests proposed to each replica since its last report that have no answer yet."""

    def __init__(self) -> None:
        self._sent: dict[Hashable, deque[Booking]] = {}
        self._open: OrderedDict[str, Booking] = OrderedDict()

    def book(self, request_id: str, replica_id: Hashable, num_tokens: int, now_s: float) -> None:
        """Note that a request is proposed to a replica. Proposed before (nobody took it), it counts here only."""
        self._cancel(request_id)
        booking = Booking(replica_id, now_s, num_tokens)
        self._sent.setdefault(replica_id, deque()).append(booking)
        self._open[request_id] = booking
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)

    def settle(self, request_id: str, replica_id: Hashable, now_s: float) -> bool:
        """Note which replica took a request; False if another one was booked for it, which is put right."""
        booking = self._open.get(request_id)
        if booking is None or booking.replica_id == replica_id:
            return True
        self.book(request_id, replica_id, booking.num_tokens, now_s)
        return False

    def finish(self, request_id: str, replica_id: Hashable) -> None:
        """Note that a replica answered a request, or refused it: its prompt does not wait there any more.

        One that was proposed to another replica meanwhile stays booked there: Serve reports a refusal late. Serve
        calls this from a thread of its own, so it only takes a name out and sets a number.
        """
        booking = self._open.get(request_id)
        if booking is not None and booking.replica_id == replica_id:
            self._cancel(request_id)

    def tokens_since(self, replica_id: Hashable, reported_s: float) -> int:
        """Prompt tokens that a replica's report does not know of; what it knows is forgotten."""
        sent = self._sent.get(replica_id)
        while sent and sent[0].sent_s <= reported_s:
            sent.popleft()
        return sum(booking.num_tokens for booking in sent) if sent else 0

    def keep_only(self, replica_ids: Collection[Hashable]) -> None:
        """Forget replicas that are gone."""
        if len(self._sent) > len(replica_ids):
            self._sent = {replica_id: sent for replica_id, sent in self._sent.items() if replica_id in replica_ids}

    def _cancel(self, request_id: str) -> None:
        booking = self._open.pop(request_id, None)
        if booking is not None:
            booking.num_tokens = 0


class SentPrefixes:
    """Names of prefixes by the replica that a request with them was last sent to; bounded."""

    def __init__(self) -> None:
        self._sent_s: OrderedDict[tuple[str, str], float] = OrderedDict()

    def note(self, replica_id: str, prefixes: TextPrefixes, now_s: float) -> None:
        """Note that a request with these prefixes was sent to a replica."""
        for name in prefixes.digests:
            self._sent_s[replica_id, name] = now_s
            self._sent_s.move_to_end((replica_id, name))
        while len(self._sent_s) > _MAX_NAMES:
            self._sent_s.popitem(last=False)

    def since(self, replica_id: str, reported_s: float, prefixes: TextPrefixes) -> set[str]:
        """Select the names that were sent to a replica too late for its report."""
        earliest_s = reported_s - _BELIEVED_S
        return {name for name in prefixes.digests if self._sent_s.get((replica_id, name), -math.inf) > earliest_s}
