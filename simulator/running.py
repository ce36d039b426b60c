"""The requests that hold a seat of one executor, and their KV blocks, with nothing done for each token.

Every decoding request gets a token in every forward pass, so a request's end is known when its decoding begins: the
number of the pass that brings its last token. Decoding requests wait in a heap by that number, their cached tokens
are one sum, and `advance` moves all of them by any number of passes at once. A decoding request takes a block every
`block_tokens` passes, in a rhythm that is known as well: requests are counted by that rhythm, and any number of passes
costs a few additions.

KV pruning goes by number of blocks: which ones does not matter here. Harm is the share of a request's blocks that are
gone, so it is known without keys.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from core.batch import Plan
from core.config import KV_PRUNING_SINK_TOKENS, KvPruningConfig
from core.errors import ConfigError
from scheduler.view import PruneOffer
from simulator.trace import TraceRequest


@dataclass(slots=True)
class SimRequest(TraceRequest):
    """A request on its way through an executor."""

    target: int = 0
    """Tokens to compute before the next one comes out: the prompt, after a preemption also what was generated."""
    computed: int = 0
    generated: int = 0
    """Tokens that are out; while the request decodes, as of `start_pass`."""
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
    num_dropped: int = 0
    """KV blocks of it that pruning has dropped."""
    work_ns: int = 0
    """Cost that the router predicted, in nanoseconds."""

    @classmethod
    def of(cls, request: TraceRequest) -> "SimRequest":
        """A request that has just arrived."""
        fields = request.request_id, request.arrival_s, request.num_prompt_tokens, request.num_output_tokens
        return cls(*fields, request.user_priority, target=request.num_prompt_tokens)

    @property
    def left(self) -> int:
        """Tokens to compute before the next one comes out."""
        return self.target - self.computed


class KvBlocks:
    """Blocks in use, and when the decoding requests will take more."""

    def __init__(self, *, kv_tokens: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.capacity = kv_tokens // block_tokens
        self.used = 0
        self._num_decode = 0
        self._takers = [0] * block_tokens
        """Decoding requests by the number, modulo `block_tokens`, of a pass before which they need a block."""

    @property
    def free(self) -> int:
        """Blocks that can be given out."""
        return self.capacity - self.used

    def holding(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` take."""
        return -(-num_tokens // self.block_tokens)

    def count_decode(self, num_tokens: int, passes: int, by: int) -> None:
        """Count a request in (`by` 1) that decodes from pass `passes` on with `num_tokens` cached, or out (-1)."""
        self._takers[(passes - num_tokens) % self.block_tokens] += by
        self._num_decode += by

    def taken_in(self, passes: int, count: int) -> int:
        """Blocks that the decoding requests take in the `count` passes from number `passes` on."""
        cycles, rest = divmod(count, self.block_tokens)
        return cycles * self._num_decode + sum(self._takers[(passes + i) % self.block_tokens] for i in range(rest))

    def passes_left(self, passes: int, most: int) -> int:
        """Number of passes, `most` at the utmost, that the free blocks last."""
        if not self._num_decode:
            return most
        free = self.free
        cycles = free // self._num_decode
        left, count = free - cycles * self._num_decode, cycles * self.block_tokens
        while count < most:
            left -= self._takers[(passes + count) % self.block_tokens]
            if left < 0:
                return count
            count += 1
        return most


class RunningSet:
    """Seats and KV cache of one executor. A prompt's blocks are reserved when it is admitted."""

    def __init__(self, max_seats: int, kv_tokens: int, block_tokens: int) -> None:
        self.max_seats = max_seats
        self.blocks = KvBlocks(kv_tokens=kv_tokens, block_tokens=block_tokens)
        self.prefills: list[SimRequest] = []
        """Requests whose prompt is in progress, in order of admission."""
        self.num_decode = 0
        self.decode_context = 0
        """Tokens of the decoding requests in the KV cache, those of dropped blocks not among them."""
        self.passes = 0
        """Forward passes with decoding so far."""
        self._decodes: dict[str, SimRequest] = {}
        self._ends: list[tuple[int, int, SimRequest]] = []
        self._sequence = 0

    def __len__(self) -> int:
        return self.num_decode + len(self.prefills)

    @property
    def decodes(self) -> Iterable[SimRequest]:
        """The decoding requests, in the order in which they began."""
        return self._decodes.values()

    @property
    def kv_capacity(self) -> int:
        """Tokens of all blocks."""
        return self.blocks.capacity * self.blocks.block_tokens

    def kv_used(self, passes: int = 0) -> int:
        """Tokens of the blocks in use after `passes` more, in which no request ends."""
        return (self.blocks.used + self.blocks.taken_in(self.passes, passes)) * self.blocks.block_tokens

    @property
    def decode_blocks(self) -> int:
        """Blocks that the decoding requests need for their next token."""
        return self.blocks.taken_in(self.passes, 1)

    def cached_tokens(self, request: SimRequest) -> int:
        """Tokens of a decoding request up to now, dropped ones included."""
        return request.target + self.passes - request.start_pass

    def check(self, request: SimRequest) -> None:
        """Refuse what could never be served.

        Raises:
            ConfigError: prompt and answer together are longer than the KV cache.
        """
        num_prompt, num_output = request.num_prompt_tokens, request.num_output_tokens
        if self.blocks.holding(num_prompt + num_output) > self.blocks.capacity:
            raise ConfigError(
                f"request {request.request_id} of {num_prompt} + {num_output} tokens does not fit the"
                f" KV cache of {self.kv_capacity} tokens"
            )

    def admit(self, request: SimRequest) -> bool:
        """Give a seat and room for the whole prompt, beside the next token of each decoding request.

        False, with nothing changed, if either is missing.
        """
        needed = self.blocks.holding(request.target)
        if len(self) >= self.max_seats or self.decode_blocks + needed > self.blocks.free:
            return False
        self.blocks.used += needed
        self.prefills.append(request)
        return True

    def start_decode(self, request: SimRequest) -> bool:
        """The prompt is computed and one token is out; False if it was the last one, and the seat is free again."""
        self.prefills.remove(request)
        request.generated += 1
        if request.generated >= request.num_output_tokens:
            self.blocks.used -= self.blocks.holding(request.target)
            return False
        request.start_pass = self.passes
        self.blocks.count_decode(request.target, self.passes, 1)
        request.end_pass = self.passes + request.num_output_tokens - request.generated
        self.num_decode += 1
        self.decode_context += request.target
        self._decodes[request.request_id] = request
        self._sequence += 1
        heapq.heappush(self._ends, (request.end_pass, self._sequence, request))
        return True

    def passes_to_change(self) -> int:
        """Number of passes that the same requests can decode: until one ends, or the KV cache is full."""
        self._drop_stale()
        return self.blocks.passes_left(self.passes, self._ends[0][0] - self.passes)

    def advance(self, passes: int) -> None:
        """Move on by forward passes with every decoding request in them."""
        self.blocks.used += self.blocks.taken_in(self.passes, passes)
        self.passes += passes
        self.decode_context += passes * self.num_decode

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
            self.blocks.used -= self.blocks.holding(request.target)
        elif self._decodes:
            request = next(reversed(self._decodes.values()))
            self._leave(request)
        else:
            return None
        request.target = request.num_prompt_tokens + request.generated
        request.computed = 0
        return request

    def check_integrity(self) -> None:
        """Books against a recount.

        Raises:
            AssertionError: they do not balance, or a capacity is exceeded.
        """
        size, decodes = self.blocks.block_tokens, self._decodes.values()
        dropped = sum(r.num_dropped for r in decodes)
        held = sum(self.blocks.holding(self.cached_tokens(r)) for r in decodes) - dropped
        assert sum(map(self.cached_tokens, decodes)) - dropped * size == self.decode_context
        assert self.decode_blocks == sum(self.cached_tokens(r) % size == 0 for r in decodes)
        assert len(self._decodes) == self.num_decode
        held += sum(self.blocks.holding(r.target) for r in self.prefills)
        assert self.blocks.used == held <= self.blocks.capacity
        assert len(self) <= self.max_seats

    def drop_block(self, request: SimRequest) -> None:
        """Give up one KV block of a decoding request."""
        request.num_dropped += 1
        self.blocks.used -= 1
        self.decode_context -= self.blocks.block_tokens

    def _leave(self, request: SimRequest) -> None:
        cached = self.cached_tokens(request)
        request.generated += self.passes - request.start_pass
        request.end_pass = -1
        self.num_decode -= 1
        self.decode_context -= cached - request.num_dropped * self.blocks.block_tokens
        self.blocks.used -= self.blocks.holding(cached) - request.num_dropped
        self.blocks.count_decode(request.target, request.start_pass, -1)
        request.num_dropped = 0  # computed anew, it has all of them
        del self._decodes[request.request_id]

    def _drop_stale(self) -> None:
        """Forget the ends of requests that were preempted meanwhile."""
        while self._ends and self._ends[0][2].end_pass != self._ends[0][0]:
            heapq.heappop(self._ends)


class SimulatedPruner:
    """Offers and drops blocks of one executor's decoding requests, as `engine.pruning.pruner.KvPruner` does.

    Blocks are offered one iteration after the planner asks for scores.
    """

    def __init__(self, config: KvPruningConfig, running: RunningSet) -> None:
        kept_tokens = (KV_PRUNING_SINK_TOKENS, config.recent_tokens)
        self._running = running
        self._max_fraction = config.max_fraction
        self._num_kept = sum(map(running.blocks.holding, kept_tokens))
        self._is_asked = False
        self._offered: list[tuple[float, int, SimRequest]] = []

    def offer(self) -> PruneOffer | None:
        """Offer the blocks that may be dropped now, least harm first; None if none may, or nobody has asked."""
        self._offered = []
        if self._is_asked:
            for order, request in enumerate(self._running.decodes):
                full = self._running.cached_tokens(request) // self._running.blocks.block_tokens
                most = min(int(self._max_fraction * full), full - self._num_kept)
                self._offered += [(gone / full, order, request) for gone in range(request.num_dropped, most)]
            self._offered.sort(key=lambda entry: entry[:2])
        return PruneOffer([harm for harm, _, _ in self._offered]) if self._offered else None

    def prune(self, plan: Plan) -> int:
        """Drop the first blocks of the last offer, as many as the plan says; returns how many there were."""
        self._is_asked = plan.wants_prune_scores
        dropped = self._offered[: plan.prune_blocks]
        for _, _, request in dropped:
            self._running.drop_block(request)
        return len(dropped)
