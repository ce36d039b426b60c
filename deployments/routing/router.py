"""Ray Serve's request router for executors: each replica reports its load, each router ranks the replicas by it.

Serve pulls `Executor.record_routing_stats` and pushes it to every router (the HTTP proxy's, and those of handles).
The routers apply `scheduler.placement.choose_executor` to it, the function that the CentralScheduler applies to the
same numbers: the answer is the same, and no central actor stands between a request and its executor.

A router sees the HTTP scope and not the body: Serve keeps the body in a queue of the proxy that only one reader may
empty, the replica. So no token ids here, and two inputs are estimates. The prompt's length is the body's length at
`BYTES_PER_TOKEN`. The cached prefix (docs/prefix_sharing.md) is the longest one
- of the names that a middleware of the proxy gave to the text's prefixes (`deployments.routing.prefix_proxy`),
among those
  that a replica reported as being in its cache (`deployments.routing.prefix_index`: its radix tree knows, by KV
  events);
- or of the same names among those sent to a replica since its report.

Without names (no middleware, no KV events) it is the session's last request (header `x-session-id`, Ray Serve's), taken
to be where it was sent.

It enters `f` as memory and seconds saved, so longest match and load are one score (`scheduler.placement`).

Reports are up to a period old. What waited then is worked off at the speed reported, and what this router sent since
waits until it is answered; otherwise all requests of a period would flee one executor, or go to one. Without a fresh
report of every replica: power of two choices.
"""

import logging
import random
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from ray import cloudpickle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from core.config import SchedulerConfig
from core.wire import ExecutorLoad
from deployments.routing.bookings import Bookings
from deployments.routing.prefix_text import TextPrefixes
from deployments.routing.sent_prefixes import SentPrefixes, cached_text_bytes
from scheduler.placement import choose_executor

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""A usual figure for English text; JSON around the prompt makes the estimate a little high, images far too high."""

REPORT_PERIOD_S = 1.0
"""How often Serve asks an executor for its load."""

STALE_S = 10 * REPORT_PERIOD_S
"""A report older than this says nothing; executors answer late while the engine is in a long iteration."""

PREFIXES_KEY = "prefixes"
"""In a replica's routing stats, beside its load: names of prefixes that are in its cache."""

_MIN_TOKEN_S = 1e-9
_MAX_SESSIONS = 65_536
_MAX_DIGITS = 15
"""Of a content-length; Python refuses to parse numbers of many thousand digits."""

Candidates = list[RunningReplica]


class ExecutorRouter(RequestRouter):
    """See the module docstring."""

    _config = SchedulerConfig()

    def initialize_state(self, scheduler: dict[str, Any] | None = None) -> None:
        """Serve calls this once, with `request_router_kwargs`: the scheduler's configuration."""
        self._config = SchedulerConfig.model_validate(scheduler or {})
        self._bookings = Bookings()
        self._sessions: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._sent_prefixes = SentPrefixes()

    async def choose_replicas(
        self, candidate_replicas: Candidates, pending_request: PendingRequest | None = None
    ) -> list[Candidates]:
        """Ranks of replicas, best first. Serve takes the first that accepts, and asks again if none does."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = (
                True  # else a full fleet would be asked in a busy loop
            )
        if len(candidate_replicas) < 2:
            return [candidate_replicas]
        if pending_request is None:
            return [_any_two(candidate_replicas)]
        now_s = self._get_curr_time_s()
        try:
            loads = self._loads(candidate_replicas, now_s)
            if loads is not None:
                return self._ranked(candidate_replicas, loads, pending_request, now_s)
        except Exception:  # raised from here, it would leave the request without an answer
            logger.exception("replicas could not be ranked; taking two at random")
        return [_any_two(candidate_replicas)]

    def _ranked(
        self, candidates: Candidates, loads: list[ExecutorLoad], request: PendingRequest, now_s: float
    ) -> list[Candidates]:
        scope = scope_of(request)
        prompt_tokens = prompt_tokens_of(scope)
        prefixes = TextPrefixes.from_headers(scope["headers"])
        cached = self._cached_tokens(candidates, loads, prefixes, request.metadata.session_id, prompt_tokens)
        by_id = {replica.replica_id.unique_id: replica for replica in candidates}
        ranks = [
            [by_id[r.executor_id]] for r in choose_executor(prompt_tokens, loads, cached, self._config.tau_mem)
        ]
        best = ranks[0][0].replica_id
        uncached = max(1, prompt_tokens - cached.get(best.unique_id, 0))
        self._bookings.book(request.metadata.internal_request_id, best, uncached, now_s)
        self._note_prefixes(request, best, prompt_tokens, prefixes, now_s)
        return ranks

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:  # noqa: ARG002 - Serve passes it
        """Serve says who took a request: rarely another replica than the first one proposed."""
        now_s = self._get_curr_time_s()
        if self._bookings.settle(pending_request.metadata.internal_request_id, replica_id, now_s):
            return
        scope = scope_of(pending_request)
        prefixes = TextPrefixes.from_headers(scope["headers"])
        self._note_prefixes(pending_request, replica_id, prompt_tokens_of(scope), prefixes, now_s)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve says that a request ended, well or not: long before a report, its prompt is not waiting any more."""
        self._bookings.finish(internal_request_id, replica_id)

    def _note_prefixes(
        self,
        request: PendingRequest,
        replica_id: ReplicaID,
        prompt_tokens: int,
        prefixes: TextPrefixes | None,
        now_s: float,
    ) -> None:
        """Session and prefixes of a request are now, or soon, in that replica's cache."""
        if request.metadata.session_id:
            self._remember(request.metadata.session_id, replica_id.unique_id, prompt_tokens)
        if prefixes is not None:
            self._sent_prefixes.note(replica_id.unique_id, prefixes, now_s)

    def _cached_tokens(
        self,
        candidates: Candidates,
        loads: list[ExecutorLoad],
        prefixes: TextPrefixes | None,
        session: str,
        prompt_tokens: int,
    ) -> dict[str, int]:
        """Prompt tokens in each replica's cache, as far as this router can know."""
        cached = {}
        if session in self._sessions:
            replica_id, num_tokens = self._sessions[session]
            cached[replica_id] = min(num_tokens, prompt_tokens)
        for replica, load in zip(candidates, loads, strict=True):
            reported = replica.routing_stats.get(PREFIXES_KEY)
            if prefixes is None or reported is None:
                continue  # no names, or nobody who knows them: the session is all there is
            sent = self._sent_prefixes.since(load.executor_id, load.reported_s, prefixes)
            num_tokens = cached_text_bytes(prefixes, {*reported, *sent}) // BYTES_PER_TOKEN
            cached[load.executor_id] = min(num_tokens, prompt_tokens)
        return cached

    def _loads(self, candidates: Candidates, now_s: float) -> list[ExecutorLoad] | None:
        """Every candidate's report brought up to now; None if one is missing, stale or unmeasured.

        An executor that never measured a prompt must get some, so it may not be ranked behind the others for ever.
        """
        loads = []
        for replica in candidates:
            load = load_of(replica.replica_id.unique_id, replica.routing_stats)
            if load is None or load.prompt_token_s is None or now_s - load.reported_s > STALE_S:
                return None
            loads.append(self._up_to_now(replica.replica_id, load, load.prompt_token_s, now_s))
        self._bookings.keep_only({replica.replica_id for replica in candidates})
        return loads

    def _up_to_now(
        self, replica_id: ReplicaID, load: ExecutorLoad, prompt_token_s: float, now_s: float
    ) -> ExecutorLoad:
        num_sent = self._bookings.tokens_since(replica_id, load.reported_s)
        age_s = max(0.0, now_s - load.reported_s)
        num_left = load.waiting_tokens - int(min(load.waiting_tokens, age_s / max(prompt_token_s, _MIN_TOKEN_S)))
        return replace(
            load,
            waiting_tokens=num_left + num_sent,
            free_kv_bytes=load.free_kv_bytes - num_sent * load.kv_bytes_per_token,
        )

    def _remember(self, session: str, replica: str, prompt_tokens: int) -> None:
        self._sessions[session] = (replica, prompt_tokens)
        self._sessions.move_to_end(session)
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)


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


def _any_two(candidates: Candidates) -> Candidates:
    """One rank of two: Serve sends the request to the one with the shorter queue."""
    return random.sample(candidates, 2)
