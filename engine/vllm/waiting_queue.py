"""vLLM's waiting queue in the order of our priorities.

vLLM peeks, decides, then pops; in between the order must not change, or it would start another request than the
one it allocated blocks for. So "now" is set once for each iteration and not read from a clock, and so is what runs.

Requests share a prefix if the hashes of their leading blocks are equal. vLLM has computed them already, with the
adapter's name in them. `_LEADING_TOKENS` decide, or all whole blocks of a shorter prompt: a few tokens that every
prompt begins with (the chat template) must not make one group of all.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from core.config import ExperimentsConfig
from engine.vllm.directive import CLIENT_KEY
from scheduler.queues.waiting import WaitingQueue

_LEADING_TOKENS = 128
"""A short system prompt; also vLLM's default block on CPU."""
_FORGET_ABOVE = 4096
"""Groups remembered beyond those of requests that run or wait, before the others are forgotten."""


class AgeingRequestQueue(RequestQueue):
    """`scheduler.queues.waiting.WaitingQueue` behind vLLM's interface."""

    def __init__(self, experiments: ExperimentsConfig, block_tokens: int | None = None) -> None:
        """Make an empty queue; with `block_tokens` of None a request's first block alone says whom it shares with."""
        self._queue: WaitingQueue[Request] = WaitingQueue(experiments)
        self._orders_prefixes = experiments.prefix_order
        self._block_tokens = block_tokens or 1
        self._leading_blocks = max(1, _LEADING_TOKENS // block_tokens) if block_tokens else 1
        self._groups: dict[str, Any] = {}
        """Groups of all requests that ever waited here and may still run, keyed by request id."""
        self._rounds: dict[str, int] = {}
        """Likewise the rounds of those that a client sent."""
        self.now_s = 0.0
        """Wall clock of the iteration that is being scheduled, like `Request.arrival_time`."""

    def head(self, count: int) -> list[Request]:
        """The first `count` requests in order."""
        return self._queue.head(count, self.now_s)

    def oldest_arrival_s(self) -> float | None:
        """Earliest arrival of any waiting request."""
        return self._queue.oldest_arrival_s()

    def add_request(self, request: Request) -> None:
        """Queue a request by its class, priority, client, arrival and prefix."""
        group = self._group_of(request) if self._orders_prefixes else None
        if group is not None:
            self._groups[request.request_id] = group
        client, name = _client_of(request), request.request_id
        at_round = self._queue.push(
            name, request, request.arrival_time, request.priority, group, client, self._rounds.get(name)
        )
        if client is not None:
            self._rounds[name] = at_round

    def note_running(self, running: Sequence[Request]) -> None:
        """Say what runs, before an iteration is scheduled: requests that share a prefix with it come sooner."""
        groups, rounds = self._groups, self._rounds
        if len(groups) + len(rounds) > _FORGET_ABOVE + 4 * len(self._queue):
            kept = {request.request_id for request in (*running, *self)}
            self._groups = groups = {name: group for name, group in groups.items() if name in kept}
            self._rounds = {name: at_round for name, at_round in rounds.items() if name in kept}
        if not groups or not len(self._queue):
            return
        in_use = {groups.get(request.request_id) for request in running}
        in_use.discard(None)
        self._queue.set_in_use(in_use)

    def invite(self, running: Sequence[Request]) -> bool:
        """Put a client's request first that has none among these, until the next call; False if none such waits."""
        return self._queue.invite({_client_of(request) for request in running}, self.now_s)

    def pop_request(self) -> Request:
        """Take out the first request."""
        return self._queue.pop(self.now_s)

    def peek_request(self) -> Request:
        """The first request."""
        return self._queue.peek(self.now_s)

    def prepend_request(self, request: Request) -> None:
        """Put a request back. Its round and its arrival bring it to the front of its class."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put requests back."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """Take out one request."""
        self._queue.remove(request.request_id)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take out several requests."""
        for request in requests:
            self._queue.remove(request.request_id)

    def _group_of(self, request: Request) -> Any:
        """Hash of the leading blocks, of which a prompt's answer is no part; None for less than a block."""
        hashes = getattr(request, "block_hashes", None)  # none if prefix caching is off
        if not hashes:
            return None
        count = min(request.num_prompt_tokens // self._block_tokens, self._leading_blocks, len(hashes))
        return hashes[count - 1] if count else None

    def __bool__(self) -> bool:
        return len(self._queue) > 0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return self._queue.iterate(self.now_s)


def _client_of(request: Request) -> str | None:
    params = request.sampling_params
    return params.extra_args.get(CLIENT_KEY) if params is not None and params.extra_args else None
