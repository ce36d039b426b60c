"""vLLM's waiting queue in the order of our priorities.

vLLM peeks, decides, then pops; in between the order must not change, or it would start another request than the
one it allocated blocks for. So "now" is set once for each iteration and not read from a clock.
"""

from collections.abc import Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from core.config import SchedulerConfig
from scheduler.waiting import WaitingQueue


class AgeingRequestQueue(RequestQueue):
    """`scheduler.waiting.WaitingQueue` behind vLLM's interface."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._queue: WaitingQueue[Request] = WaitingQueue(config)
        self.now_s = 0.0
        """Wall clock of the iteration that is being scheduled, like `Request.arrival_time`."""

    def head(self, count: int) -> list[Request]:
        """The first `count` requests in order."""
        return self._queue.head(count, self.now_s)

    def oldest_arrival_s(self) -> float | None:
        """Earliest arrival of any waiting request."""
        return self._queue.oldest_arrival_s()

    def add_request(self, request: Request) -> None:
        """Queue a request by its class, priority and arrival."""
        self._queue.push(request.request_id, request, request.arrival_time, request.priority)

    def pop_request(self) -> Request:
        """Take out the first request."""
        return self._queue.pop(self.now_s)

    def peek_request(self) -> Request:
        """The first request."""
        return self._queue.peek(self.now_s)

    def prepend_request(self, request: Request) -> None:
        """Put a request back. Its arrival time brings it to the front of its class."""
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

    def __bool__(self) -> bool:
        return len(self._queue) > 0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return self._queue.iterate(self.now_s)
