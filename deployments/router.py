"""Ray Serve's request router for executors: each replica reports its load, each router ranks the replicas by it.

Serve pulls `Executor.record_routing_stats` and pushes it to every router (the HTTP proxy's, and those of handles).
The routers apply `scheduler.placement.choose_executor` to it, the function that the CentralScheduler applies to the
same numbers: the answer is the same, and no central actor stands between a request and its executor.

A router sees the HTTP scope and not the body, so two inputs are estimates. The prompt's length is the body's length
at `BYTES_PER_TOKEN`. The cached prefix is known for requests that name their session (header `x-session-id`, Ray
Serve's): what the session's last request sent to a replica is taken to be in that replica's prefix cache.

Reports are up to a period old, so a router counts what it sent since then; otherwise every request of that period
would go to the same executor. Without a fresh report of every replica: power of two choices.
"""

import logging
import random
from collections import OrderedDict, deque
from dataclasses import replace
from typing import Any

from ray import cloudpickle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from core.config import SchedulerConfig
from core.messages import ExecutorLoad
from scheduler.placement import choose_executor

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""A usual figure for English text; JSON around the prompt makes the estimate a little high, images far too high."""

REPORT_PERIOD_S = 1.0
"""How often Serve asks an executor for its load."""

STALE_S = 10 * REPORT_PERIOD_S
"""A report older than this says nothing; executors answer late while the engine is in a long iteration."""

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
        self._sent: dict[ReplicaID, deque[tuple[float, int]]] = {}
        self._sessions: OrderedDict[str, tuple[str, int]] = OrderedDict()

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
        prompt_tokens = prompt_tokens_of(request)
        session = request.metadata.session_id
        cached = {}
        if session in self._sessions:
            replica, num_tokens = self._sessions[session]
            cached[replica] = min(num_tokens, prompt_tokens)
        by_id = {replica.replica_id.unique_id: replica for replica in candidates}
        ranks = [[by_id[r.executor_id]] for r in choose_executor(prompt_tokens, loads, cached, self._config)]
        best = ranks[0][0].replica_id
        uncached = max(1, prompt_tokens - cached.get(best.unique_id, 0))
        self._sent.setdefault(best, deque()).append((now_s, uncached))
        if session:
            self._remember(session, best.unique_id, prompt_tokens)
        return ranks

    def _loads(self, candidates: Candidates, now_s: float) -> list[ExecutorLoad] | None:
        """Every candidate's report plus what was sent to it since; None if one is missing, stale or unmeasured.

        An executor that never measured a prompt must get some, so it may not be ranked behind the others for ever.
        """
        loads = []
        for replica in candidates:
            load = load_of(replica.replica_id.unique_id, replica.routing_stats)
            if load is None or load.prompt_token_s is None or now_s - load.reported_s > STALE_S:
                return None
            loads.append(self._with_sent(replica.replica_id, load))
        if len(self._sent) > len(candidates):
            live = {replica.replica_id for replica in candidates}
            self._sent = {replica_id: sent for replica_id, sent in self._sent.items() if replica_id in live}
        return loads

    def _with_sent(self, replica_id: ReplicaID, load: ExecutorLoad) -> ExecutorLoad:
        sent = self._sent.get(replica_id)
        while sent and sent[0][0] <= load.reported_s:
            sent.popleft()
        if not sent:
            return load
        num_tokens = sum(tokens for _, tokens in sent)
        return replace(
            load,
            waiting_tokens=load.waiting_tokens + num_tokens,
            free_kv_bytes=load.free_kv_bytes - num_tokens * load.kv_bytes_per_token,
        )

    def _remember(self, session: str, replica: str, prompt_tokens: int) -> None:
        self._sessions[session] = (replica, prompt_tokens)
        self._sessions.move_to_end(session)
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)


def load_of(executor_id: str, stats: dict[str, Any]) -> ExecutorLoad | None:
    """A replica's routing stats as a load; None if it reports none, or has those of another version of MACE."""
    try:
        return ExecutorLoad(**{**stats, "executor_id": executor_id})
    except TypeError:
        return None


def prompt_tokens_of(request: PendingRequest) -> int:
    """Estimated prompt tokens of a request, from its `content-length`; 1 if it has none."""
    if not request.metadata.is_http_request or not request.args:
        return 1
    # Bytes that this process pickled itself (Serve's proxy), on their way to the replica.
    scope = cloudpickle.loads(request.args[0]).asgi_scope
    length: bytes = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return max(1, int(length) // BYTES_PER_TOKEN) if length.isdigit() and len(length) <= _MAX_DIGITS else 1


def _any_two(candidates: Candidates) -> Candidates:
    """One rank of two: Serve sends the request to the one with the shorter queue."""
    return random.sample(candidates, 2)
