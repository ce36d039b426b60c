"""The waiting order of requests: dynamic priority by class, then arrival, then sequence number.

All requests of one `priority` value age at one rate, so among them the order is fixed: a sorted list for each value,
and only their heads are compared at the moment of asking.

Requests that share a prefix go together: who shares one with a running request is treated as if it had arrived
`HEAD_START_S` earlier. Its keys and values are in the cache now and may be gone later, and while both run they need
memory for them once. As soon as the first of a group runs, the others follow it. It is part of the one priority:

    P(t) = base + rate * (wait_s + HEAD_START_S)    if the prefix is in use,    base + rate * wait_s    otherwise

So nobody starves: within a `priority` value and a round a request is overtaken only by those that arrived less than
`HEAD_START_S` after it, however many share prefixes, whatever the rate.

Clients of one `priority` value take turns (start-time fair queueing, in requests): the first `CLIENT_TURN` requests of
a client that wait belong to the round that is being served, the next ones to the round after it, and so on, and a
round goes before the next. So a client's request is never behind another's hundred, and the hundred never starve.

Turns order those that wait; they do not help where one client's long answers hold all seats. Some seats more
(`guest_seats`) are for guests: requests of clients that hold none. `invite` puts such a request first.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Generic, TypeVar

from core.config import ExperimentsConfig
from scheduler.priority import clamp_user_priority, prefill_base, prefill_rate

HEAD_START_S = 0.5
"""A request whose prefix is in use overtakes only those of its priority that arrived at most so much earlier."""

CLIENT_TURN = 8
"""Requests of one client in a round. Few enough that others hardly wait, enough for prefixes to be ordered among."""

_MANY_CLIENTS = 4096
"""Above this, clients whose turn is over are forgotten."""

T = TypeVar("T")
Client = Hashable
"""Who sent a request; None takes no turns, as our own requests do and those of the simulator."""
Group = Hashable
"""Names a prefix; None for a request that shares none."""
_Entry = tuple[int, float, int, str, Group]
"""Round, arrival, sequence number, id, group. No two have one sequence number, so groups are never compared."""
_Turn = tuple[int, float]
"""Round, and arrival minus head start."""
_Key = tuple[float, _Turn, _Entry]
"""Minus the priority, the turn, and the entry."""


def guest_seats(seats: int) -> int:
    """Seats beyond those that anybody may take."""
    return max(1, seats // 8)


@dataclass(slots=True)
class _Lane:
    """Requests of one `priority` value."""

    base: float
    rate: float
    entries: list[_Entry] = field(default_factory=list)
    """Oldest first."""
    groups: dict[Group, list[_Entry]] = field(default_factory=dict)
    """The same entries by group, oldest first."""
    hot: dict[Group, _Entry] = field(default_factory=dict)
    """First entry of each group whose prefix is in use."""
    hot_heads: list[_Entry] = field(default_factory=list)
    """The values of `hot`, oldest first."""
    round: int = 0
    """The round of what was served last."""
    shares: dict[Client, int] = field(default_factory=dict)
    """Requests of each client so far, counted from round 0: the next one belongs to the quotient by `CLIENT_TURN`."""

    def next_round(self, client: Client) -> int:
        """The round of a client's next request."""
        if client is None:
            return self.round
        if len(self.shares) > _MANY_CLIENTS:
            self.shares = {name: share for name, share in self.shares.items() if share > self.round * CLIENT_TURN}
        share = max(self.shares.get(client, 0), self.round * CLIENT_TURN)
        self.shares[client] = share + 1
        return share // CLIENT_TURN

    def add(self, entry: _Entry, *, is_hot: bool) -> None:
        """Put an entry into its place."""
        insort(self.entries, entry)
        if entry[4] is not None:
            insort(self.groups.setdefault(entry[4], []), entry)
            if is_hot:
                self.heat(entry[4])

    def remove(self, entry: _Entry) -> None:
        """Take an entry out."""
        del self.entries[bisect_left(self.entries, entry)]
        members = self.groups.get(entry[4])
        if members is None:
            return
        del members[bisect_left(members, entry)]
        was_hot = self.cool(entry[4])
        if not members:
            del self.groups[entry[4]]
        elif was_hot:
            self.heat(entry[4])

    def heat(self, group: Group) -> None:
        """The group's prefix is in use, or its first entry has changed."""
        members = self.groups.get(group)
        if members is not None and self.hot.get(group) is not members[0]:
            self.cool(group)
            self.hot[group] = members[0]
            insort(self.hot_heads, members[0])

    def cool(self, group: Group) -> bool:
        """The group's prefix is in use no more; False if it was not."""
        head = self.hot.pop(group, None)
        if head is None:
            return False
        del self.hot_heads[bisect_left(self.hot_heads, head)]
        return True

    def first(self, now_s: float) -> _Key:
        """Key of the entry that comes first; the lane must not be empty."""
        entry = self.entries[0]
        turn = entry[:2]
        if self.hot_heads:  # if `entry` is hot itself, it is the first of these
            hot = self.hot_heads[0]
            turn, entry = min((turn, entry), (_hot_turn(hot), hot))
        return self.key(turn, entry, now_s)

    def key(self, turn: _Turn, entry: _Entry, now_s: float) -> _Key:
        """Sorts as the total order does: highest priority, earliest turn, earliest arrival first."""
        return (-(self.base + self.rate * max(0.0, now_s - turn[1])), turn, entry)

    def keyed(self, now_s: float) -> Iterator[_Key]:
        """Keys in order of turns."""
        return (self.key(turn, entry, now_s) for turn, entry in self.in_order())

    def in_order(self) -> Iterator[tuple[_Turn, _Entry]]:
        """Entries in order, each with its turn. Takes as long as what is taken from it."""
        if not self.hot:
            return ((entry[:2], entry) for entry in self.entries)
        hot = heapq.merge(*(self.groups[group] for group in self.hot))
        cold = ((entry[:2], entry) for entry in self.entries if entry[4] not in self.hot)
        return heapq.merge(((_hot_turn(entry), entry) for entry in hot), cold)


def _hot_turn(entry: _Entry) -> _Turn:
    return entry[0], entry[1] - HEAD_START_S


class WaitingQueue(Generic[T]):
    """Requests that wait for their first token. Times are on one clock of the caller's choice."""

    def __init__(self, experiments: ExperimentsConfig) -> None:
        self._experiments = experiments
        self._lanes: dict[int, _Lane] = {}
        self._where: dict[str, tuple[int, _Entry]] = {}
        self._payloads: dict[str, T] = {}
        self._arrivals: list[tuple[float, str]] = []
        """Of all that wait, oldest first."""
        self._in_use: AbstractSet[Group] = frozenset()
        self._sequence = 0
        self._clients: dict[str, Client] = {}
        """Who sent what waits, by request id."""
        self._num_waiting: Counter[Client] = Counter()
        """How many each client has waiting; those with none are left out."""
        self._guest: str | None = None
        """Goes before all others."""

    def __len__(self) -> int:
        return len(self._payloads)

    def push(
        self,
        request_id: str,
        payload: T,
        arrived_s: float,
        user_priority: int = 0,
        group: Group = None,
        client: Client = None,
        at_round: int | None = None,
    ) -> int:
        """Add a request, or put it anew.

        A preempted or skipped one keeps its arrival and, as `at_round`, what this returned: it comes back to its place.

        Returns:
            The round that it belongs to.
        """
        self.remove(request_id)
        lane_key = clamp_user_priority(user_priority)
        lane = self._lanes.get(lane_key)
        if lane is None:
            rate = prefill_rate(lane_key, self._experiments)
            lane = self._lanes[lane_key] = _Lane(prefill_base(lane_key), rate)
        self._sequence += 1
        group = group if self._experiments.prefix_order else None
        if at_round is None:
            at_round = lane.next_round(client)
        else:
            lane.round = min(lane.round, at_round)
        entry = (at_round, arrived_s, self._sequence, request_id, group)
        lane.add(entry, is_hot=group in self._in_use)
        self._where[request_id] = (lane_key, entry)
        self._payloads[request_id] = payload
        if client is not None:
            self._clients[request_id] = client
            self._num_waiting[client] += 1
        insort(self._arrivals, (arrived_s, request_id))
        return at_round

    def set_in_use(self, groups: AbstractSet[Group]) -> None:
        """Say whose prefixes running requests use. Call between iterations: it changes the order."""
        if not self._experiments.prefix_order or groups == self._in_use:
            return
        for lane in self._lanes.values():
            for group in self._in_use - groups:
                lane.cool(group)
            for group in groups - self._in_use:
                lane.heat(group)
        self._in_use = frozenset(groups)

    def invite(self, seated: AbstractSet[Client], now_s: float) -> bool:
        """Put first the first request whose client is not among these, until the next call; False if none waits.

        Requests without a client are nobody's guests. Call between iterations: it changes the order.
        """
        self._guest = None
        guests = self._num_waiting.keys() - seated
        if guests:
            self._guest = next(name for name in self._names(now_s) if self._clients.get(name) in guests)
        return bool(guests)

    def peek(self, now_s: float) -> T:
        """The request that runs next; IndexError if the queue is empty."""
        return self._payloads[self._first(now_s)]

    def pop(self, now_s: float) -> T:
        """Take out the request that runs next; IndexError if the queue is empty."""
        request_id = self._first(now_s)
        payload = self._payloads[request_id]
        lane_key, entry = self._where[request_id]
        if request_id != self._guest:  # the turn of a guest of a later round has not come
            self._lanes[lane_key].round = entry[0]
        self.remove(request_id)
        return payload

    def remove(self, request_id: str) -> T | None:
        """Take out one request; None if it does not wait."""
        where = self._where.pop(request_id, None)
        if where is None:
            return None
        lane_key, entry = where
        self._lanes[lane_key].remove(entry)
        if request_id == self._guest:
            self._guest = None
        client = self._clients.pop(request_id, None)
        if client is not None:
            self._num_waiting[client] -= 1
            if not self._num_waiting[client]:
                del self._num_waiting[client]
        del self._arrivals[bisect_left(self._arrivals, (entry[1], request_id))]
        return self._payloads.pop(request_id)

    def head(self, count: int, now_s: float) -> list[T]:
        """The first `count` requests in order."""
        return list(islice(self.iterate(now_s), count))

    def iterate(self, now_s: float) -> Iterator[T]:
        """All requests in order. The queue must not change meanwhile."""
        return (self._payloads[name] for name in self._names(now_s))

    def oldest_arrival_s(self) -> float | None:
        """Earliest arrival of any waiting request."""
        return self._arrivals[0][0] if self._arrivals else None

    def _names(self, now_s: float) -> Iterator[str]:
        lanes = [lane for lane in self._lanes.values() if lane.entries]
        if len(lanes) == 1:  # the usual case, and vLLM walks the queue often
            names = (entry[3] for _, entry in lanes[0].in_order())
        else:
            names = (entry[3] for _, _, entry in heapq.merge(*(lane.keyed(now_s) for lane in lanes)))
        guest = self._guest
        return names if guest is None else chain((guest,), (name for name in names if name != guest))

    def _first(self, now_s: float) -> str:
        if self._guest is not None:
            return self._guest
        firsts = [lane.first(now_s) for lane in self._lanes.values() if lane.entries]
        if not firsts:
            raise IndexError("no request is waiting")
        return min(firsts)[2][3]
