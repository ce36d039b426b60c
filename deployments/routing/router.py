"""Ray Serve's request router for executors: each replica reports its load, each router ranks the replicas by it.

Serve pulls `Executor.record_routing_stats` and pushes it to every router (the HTTP proxy's, and those of handles).
The routers apply `scheduler.placement.choose_executor` to it, the function that the CentralScheduler applies to the
same numbers: the answer is the same, and no central actor stands between a request and its executor.

A router sees the HTTP scope and not the body: Serve keeps the body in a queue of the proxy that only one reader may
empty, the replica. So no token ids here, and two inputs are estimates. The prompt's length is the body's length at
`BYTES_PER_TOKEN`. The cached prefix (docs/concepts.md) is the longest of the names that the proxy gave to the
text's prefixes (`deployments.routing.prefix_names`), among those that a replica reported as being in its cache
(`deployments.routing.prefix_index`) and those sent to it since its report. Without names (no middleware, no KV events)
it is the session's last request (header `x-session-id`, Ray Serve's), taken to be where it was sent.

It enters `f` as memory and seconds saved, so longest match and load are one score (`scheduler.placement`).

Reports are up to a period old. What waited then is worked off at the speed reported, and what this router sent since
waits until it is answered; otherwise all requests of a period would flee one executor, or go to one. Without a fresh
report of every replica: power of two choices.
"""

import logging
import random
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

from ray import cloudpickle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from core.wire import ExecutorLoad
from deployments.routing.prefix_names import TextPrefixes
from deployments.routing.sent import Bookings, SentPrefixes
from scheduler.placement import choose_executor

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""A usual figure for English text; JSON around the prompt makes the estimate a little high, images far too high."""

REPORT_PERIOD_S = 1.0
"""Seconds between two times that Serve asks an executor for its load."""

STALE_S = 10 * REPORT_PERIOD_S
"""A report older than this says nothing; executors answer late while the engine is in a long iteration."""

PREFIXES_KEY = "prefixes"
"""In a replica's routing stats, beside its load: names of prefixes that are in its cache."""

_MIN_TOKEN_S = 1e-9
_MAX_SESSIONS = 65_536
_MAX_DIGITS = 15
"""Longest content-length that is read; Python refuses to parse numbers of many thousand digits."""

Candidates = list[RunningReplica]


@dataclass(frozen=True, slots=True)
class _SeenPrompt:
    """A request's prompt, as far as a router can see it."""

    num_tokens: int
    prefixes: TextPrefixes | None
    session: str
    """Empty if the client names none."""

    @classmethod
    def of(cls, request: PendingRequest) -> "_SeenPrompt":
        scope = scope_of(request)
        prefixes = TextPrefixes.from_headers(scope["headers"])
        return cls(prompt_tokens_of(scope), prefixes, request.metadata.session_id)


class ExecutorRouter(RequestRouter):
    """Ranks replicas for each request; see the module docstring."""

    def initialize_state(self, tau_mem: float) -> None:
        """Take `request_router_kwargs`, once, from Serve: the share of its KV memory that an executor may fill."""
        self._tau_mem = tau_mem
        self._bookings = Bookings()
        self._sessions: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._sent_prefixes = SentPrefixes()

    async def choose_replicas(
        self, candidate_replicas: Candidates, pending_request: PendingRequest | None = None
    ) -> list[Candidates]:
        """Ranks of replicas, best first. Serve takes the first that accepts, and asks again if none does."""
        if pending_request is not None:  # else a full fleet would be asked in a busy loop
            pending_request.routing_context.should_backoff = True
        if len(candidate_replicas) < 2:
            return [candidate_replicas]
        try:
            now_s = self._get_curr_time_s()
            loads = self._loads(candidate_replicas, now_s) if pending_request is not None else None
            if loads is not None and pending_request is not None:
                return self._ranked(candidate_replicas, loads, pending_request, now_s)
        except Exception:  # raised from here, it would leave the request without an answer
            logger.exception("replicas could not be ranked; taking two at random")
        return [random.sample(candidate_replicas, 2)]  # one rank: Serve takes the one with the shorter queue

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:  # noqa: ARG002 - Serve passes it
        """Serve says who took a request: rarely another replica than the first one proposed."""
        now_s = self._get_curr_time_s()
        if not self._bookings.settle(pending_request.metadata.internal_request_id, replica_id, now_s):
            self._note(_SeenPrompt.of(pending_request), replica_id, now_s)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve says that a request ended, well or not: long before a report, its prompt is not waiting any more."""
        self._bookings.finish(internal_request_id, replica_id)

    def _ranked(
        self, candidates: Candidates, loads: list[ExecutorLoad], request: PendingRequest, now_s: float
    ) -> list[Candidates]:
        prompt = _SeenPrompt.of(request)
        cached = self._cached_tokens(candidates, loads, prompt)
        by_id = {replica.replica_id.unique_id: replica for replica in candidates}
        ranking = choose_executor(prompt.num_tokens, loads, cached, self._tau_mem)
        best = by_id[ranking[0].executor_id].replica_id
        uncached = max(1, prompt.num_tokens - cached.get(best.unique_id, 0))
        self._bookings.book(request.metadata.internal_request_id, best, uncached, now_s)
        self._note(prompt, best, now_s)
        return [[by_id[ranked.executor_id]] for ranked in ranking]

    def _note(self, prompt: _SeenPrompt, replica_id: ReplicaID, now_s: float) -> None:
        """Note that session and prefixes of a prompt are now, or soon, in that replica's cache."""
        if prompt.session:
            self._sessions[prompt.session] = (replica_id.unique_id, prompt.num_tokens)
            self._sessions.move_to_end(prompt.session)
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
        if prompt.prefixes is not None:
            self._sent_prefixes.note(replica_id.unique_id, prompt.prefixes, now_s)

    def _cached_tokens(
        self, candidates: Candidates, loads: list[ExecutorLoad], prompt: _SeenPrompt
    ) -> dict[str, int]:
        """Prompt tokens in each replica's cache, as far as this router can know."""
        cached = {}
        if prompt.session in self._sessions:
            replica_id, num_tokens = self._sessions[prompt.session]
            cached[replica_id] = num_tokens
        for replica, load in zip(candidates, loads, strict=True):
            reported = replica.routing_stats.get(PREFIXES_KEY)
            if prompt.prefixes is None or reported is None:
                continue  # no names, or nobody who knows them: the session is all there is
            sent = self._sent_prefixes.since(load.executor_id, load.reported_s, prompt.prefixes)
            cached[load.executor_id] = prompt.prefixes.bytes_among({*reported, *sent}) // BYTES_PER_TOKEN
        return {name: min(num_tokens, prompt.num_tokens) for name, num_tokens in cached.items()}

    def _loads(self, candidates: Candidates, now_s: float) -> list[ExecutorLoad] | None:
        """Every candidate's report brought up to now; None if one is missing, stale or unmeasured.

        An executor that never measured a prompt must get some, so it may not be ranked behind the others for ever.
        """
        loads = []
        for replica in candidates:
            load = load_of(replica.replica_id.unique_id, replica.routing_stats)
            if load is None or load.prompt_token_s is None or now_s - load.reported_s > STALE_S:
                return None
            num_done = max(0.0, now_s - load.reported_s) / max(load.prompt_token_s, _MIN_TOKEN_S)
            num_left = load.waiting_tokens - int(min(load.waiting_tokens, num_done))
            num_sent = self._bookings.tokens_since(replica.replica_id, load.reported_s)
            free_kv_bytes = load.free_kv_bytes - num_sent * load.kv_bytes_per_token
            loads.append(replace(load, waiting_tokens=num_left + num_sent, free_kv_bytes=free_kv_bytes))
        self._bookings.keep_only({replica.replica_id for replica in candidates})
        return loads


def load_of(executor_id: str, stats: dict[str, Any]) -> ExecutorLoad | None:
    """A replica's routing stats as a load; None if it reports none, or has those of another version of MACE."""
    fields = {name: value for name, value in stats.items() if name != PREFIXES_KEY}
    try:
        return ExecutorLoad(**{**fields, "executor_id": executor_id})
    except TypeError:
        return None


def scope_of(request: PendingRequest) -> dict[str, Any]:
    """The ASGI scope of a request; one without headers for calls through a handle."""
    if not request.metadata.is_http_request or not request.args:
        return {"headers": []}
    # Bytes that this process pickled itself (Serve's proxy), on their way to the replica.
    scope: dict[str, Any] = cloudpickle.loads(request.args[0]).asgi_scope
    return scope


def prompt_tokens_of(scope: dict[str, Any]) -> int:
    """Estimated prompt tokens of a request, from its `content-length`; 1 if it has none."""
    length: bytes = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return max(1, int(length) // BYTES_PER_TOKEN) if length.isdigit() and len(length) <= _MAX_DIGITS else 1
