"""What one run leaves behind, as JSON in `DIR/runs/`; tables, pictures and checks are made from these files alone."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.studies.drift.plan import DriftPlan

BASE = "base"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Look(_Record):
    """The server's counters at one moment. None: it does not tell."""

    time_s: float
    """Since the first phase began."""
    version: str
    """Live version: `v000N` or `base`."""
    steps: int
    """Optimizer steps so far."""
    pairs: int
    """Pairs that they trained, each pass counted."""
    phase: str
    decision: str | None = None
    """What the gate said last."""
    queued_pairs: int | None = None
    retrain_rate: float | None = None
    gamma: float | None = None
    level: float | None = None
    """Drift level, 0 to 1."""


class Reply(_Record):
    """One answered chat request."""

    sent_s: float
    style: str | None
    is_right: bool


class Stream(_Record):
    """The light stream of chat requests; those of the warm-up are left out."""

    num_requests: int = 0
    errors: tuple[str, ...] = ()
    ttft_s: tuple[float, ...] = ()
    """First token minus scheduled arrival."""
    tbt_s: tuple[float, ...] = ()
    replies: tuple[Reply, ...] = ()


class Posts(_Record):
    """What became of the posted pairs."""

    accepted: int = 0
    errors: tuple[str, ...] = ()
    p99_s: float | None = None
    """Time of a `POST /v1/feedback`."""
    max_lag_s: float = 0.0
    """How late one was sent at most."""


class RunRecord(_Record):
    """One policy with one seed."""

    policy: str
    seed: int
    plan: DriftPlan
    args: dict[str, Any]
    """The server's settings, as in its config file."""
    versions: dict[str, str]
    """Of packages."""
    beta: float
    looks: tuple[Look, ...] = Field(min_length=1)
    stream: Stream
    posts: Posts
    scores: dict[str, dict[str, tuple[tuple[float, float], ...]]]
    """By version and style: log-probs (nats) of chosen and rejected of each held-out pair, in their fixed order."""
    facts: dict[str, tuple[str, ...]]
    """By style: the fact behind each held-out pair; pairs of one fact are not independent."""
    adapters: tuple[dict[str, Any], ...] = ()
    """`GET /v1/adapters` at the end."""
    start_s: float
    """From the start of the server to readiness."""
    served_gap: float
    """Largest difference (nats) of a token's log-prob between the server's `<name>` and the live version's files."""
