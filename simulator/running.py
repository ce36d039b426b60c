"""The requests that hold a seat of one executor, with nothing done for each token.

Every decoding request gets a token in every forward pass, so a request's end is known when its decoding begins: the
number of the pass that brings its last token. Decoding requests wait in a heap by that number, their cached tokens
are one sum, and `advance` moves all of them by any number of passes at once.
"""

import heapq
from dataclasses import dataclass

from core.errors import ConfigError
from simulator.trace import TraceRequest


@dataclass(slots=True)
class SimRequest:
    """A request on its way through an executor."""

    request_id: str
    arrival_s: float
    num_prompt: int
    num_output: int
    user_priority: int
    target: int
    """Tokens to compute before the next one comes out: the prompt, after a preemption also what was generated."""
    computed: int = 0
    generated: int = 0
    """While the request decodes: as of `start_pass`."""
    start_pass: int = 0
    end_pass: int = -1
    """-1: does not decode."""
    first_token_s: float = -1.0
    last_token_s: float = -1.0
    """Set by a preemption: the next token's gap begins there."""
    is_late: bool = False
    """A token of it missed the TBT target before it was preempted."""
    late_since_s: float = -1.0
    """Late tokens of the executor count from here on."""
    work_ns: int = 0
    """What the router predicted it to cost."""

    @classmethod
    def of(cls, request: TraceRequest) -> "SimRequest":
        """A request that has just arrived."""
        return cls(
            request.request_id,
            request.arrival_s,
            request.num_prompt_tokens,
            request.num_output_tokens,
            request.user_priority,
            target=request.num_prompt_tokens,
        )

    @property
    def left(self) -> int:
        """Tokens to compute before the next one comes out."""
        return self.target - self.computed


class RunningSet:
    """Seats and KV cache of one executor. A prompt's tokens are reserved when it is admitted."""

    def __init__(self, *, max_seats: int, kv_tokens: int) -> None:
        self.max_seats = max_seats
        self.kv_capacity = kv_tokens
        self.kv_used = 0
        self.prefills: list[SimRequest] = []
        """In order of admission."""
        self.num_decode = 0
        self.decode_context = 0
        """Tokens of the decoding requests in the KV cache."""
        self.passes = 0
        """Forward passes with decoding so far."""
        self._decodes: dict[str, SimRequest] = {}
        self._ends: list[tuple[int, int, SimRequest]] = []
        self._sequence = 0

    def __len__(self) -> int:
        return self.num_decode + len(self.prefills)

    def check(self, request: SimRequest) -> None:
        """Refuse what could never be served.

        Raises:
            ConfigError: prompt and answer together are longer than the KV cache.
        """
        if request.num_prompt + request.num_output > self.kv_capacity:
            raise ConfigError(
                f"request {request.request_id} of {request.num_prompt} + {request.num_output} tokens does not fit the"
                f" KV cache of {self.kv_capacity} tokens"
            )

    def admit(self, request: SimRequest) -> bool:
        """Give a seat and room for the whole prompt, beside the next token of each decoding request.

        False, with nothing changed, if either is missing.
        """
        if len(self) >= self.max_seats or self.kv_used + self.num_decode + request.target > self.kv_capacity:
            return False
        self.kv_used += request.target
        self.prefills.append(request)
        return True

    def start_decode(self, request: SimRequest) -> bool:
        """The prompt is computed and one token is out; False if it was the last one, and the seat is free again."""
        self.prefills.remove(request)
        request.generated += 1
        if request.generated >= request.num_output:
            self.kv_used -= request.target
            return False
        request.start_pass = self.passes
        request.end_pass = self.passes + request.num_output - request.generated
        self.num_decode += 1
        self.decode_context += request.target
        self._decodes[request.request_id] = request
        self._sequence += 1
        heapq.heappush(self._ends, (request.end_pass, self._sequence, request))
        return True

    def passes_to_change(self) -> int:
        """How many passes the same requests can decode: until one ends, or the KV cache is full."""
        room = (self.kv_capacity - self.kv_used) // self.num_decode
        self._drop_stale()
        return min(room, self._ends[0][0] - self.passes)

    def advance(self, passes: int) -> None:
        """So many forward passes with every decoding request in them."""
        self.passes += passes
        self.decode_context += passes * self.num_decode
        self.kv_used += passes * self.num_decode

    def pop_ended(self) -> list[SimRequest]:
        """Take out the requests whose last token is out; their KV memory is free."""
        ended = []
        self._drop_stale()
        while self._ends and self._ends[0][0] <= self.passes:
            request = heapq.heappop(self._ends)[2]
            self._leave(request)
            ended.append(request)
            self._drop_stale()
        return ended

    def preempt(self) -> SimRequest | None:
        """vLLM's victim when KV blocks run out: the last one admitted, prompts in progress first.

        Its KV memory is free; it must compute prompt and generated tokens again.
        """
        if self.prefills:
            request = self.prefills.pop()
            self.kv_used -= request.target
        elif self._decodes:
            request = next(reversed(self._decodes.values()))
            self._leave(request)
        else:
            return None
        request.target = request.num_prompt + request.generated
        request.computed = 0
        return request

    def check_integrity(self) -> None:
        """Books against a recount.

        Raises:
            AssertionError: they do not balance, or a capacity is exceeded.
        """
        contexts = sum(r.target + self.passes - r.start_pass for r in self._decodes.values())
        assert contexts == self.decode_context
        assert len(self._decodes) == self.num_decode
        assert self.kv_used == contexts + sum(r.target for r in self.prefills) <= self.kv_capacity
        assert len(self) <= self.max_seats

    def _leave(self, request: SimRequest) -> None:
        passed = self.passes - request.start_pass
        request.generated += passed
        request.end_pass = -1
        self.num_decode -= 1
        self.decode_context -= request.target + passed
        self.kv_used -= request.target + passed
        del self._decodes[request.request_id]

    def _drop_stale(self) -> None:
        """Forget the ends of requests that were preempted meanwhile."""
        while self._ends and self._ends[0][2].end_pass != self._ends[0][0]:
            heapq.heappop(self._ends)
