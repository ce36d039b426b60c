"""Which process is killed at which moment: seeded, and such that every kind is hit and meets every moment."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

Kind = Literal["executor", "engine", "worker", "control", "scheduler", "monitor", "proxy", "controller", "head"]
Moment = Literal["any", "request", "feedback", "training", "publishing"]

KINDS: tuple[Kind, ...] = get_args(Kind)
MOMENTS: tuple[Moment, ...] = get_args(Moment)

TARGETS: dict[Kind, tuple[str, ...]] = {
    "executor": ("ServeReplica:mace:Executor",),
    "engine": ("VLLM::EngineCore",),
    "worker": ("VLLM::Worker",),
    "control": ("ServeReplica:mace:Control",),
    "scheduler": ("ray::CentralScheduler",),
    "monitor": ("ray::DriftMonitor",),
    "proxy": ("ray::ProxyActor",),
    "controller": ("ray::ServeController",),
    "head": ("mace serve", "core/src/ray/raylet/raylet", "core/src/ray/gcs/gcs_server"),
}
"""Parts of command lines. On a GPU the worker lives in the EngineCore process, and there is none to find."""

_DELAYS_S: dict[Moment, float] = {
    "any": 2.0,
    "request": 0.1,
    "feedback": 0.02,
    "training": 0.3,
    "publishing": 0.05,
}
"""How long after its sign the blow may fall at the latest."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Strike:
    """One kill to be."""

    kind: Kind
    target: str
    """Part of the victim's command line; `mace serve` is the server process itself."""
    moment: Moment
    delay_s: float
    """Between the sign of the moment and the blow."""


def make_plan(kills: int, seed: int, kinds: Sequence[Kind] = KINDS) -> list[Strike]:
    """Every kind once in random order, then again in another order, and so on; targets and moments alike."""
    rng = random.Random(seed)
    order = _rounds(rng, kinds)
    targets = {kind: _rounds(rng, TARGETS[kind]) for kind in kinds}
    moments = {kind: _rounds(rng, MOMENTS) for kind in kinds}
    plan: list[Strike] = []
    for kind in (next(order) for _ in range(kills)):
        moment = next(moments[kind])
        plan.append(Strike(kind, next(targets[kind]), moment, rng.uniform(0.0, _DELAYS_S[moment])))
    return plan


def _rounds(rng: random.Random, values: Sequence[T]) -> Iterator[T]:
    while True:
        yield from rng.sample(values, len(values))
