"""The course of a run, drawn before it starts: who prefers what, which pairs are posted, what is asked, who trains.

Everything but the policy depends on the plan and the seed alone, so every policy meets the same pairs and requests at
the same times. Policies are settings of the server; nothing else differs between them.

`periodic` is Ekya's scheme on this server: it collects for a window and then stops inference to train on what came. Two
windows a phase are a generous choice: with fewer a phase could end before the first training. `continuous` trains
as soon as there is a batch, stopping inference as well. It may train `HEADROOM` times what comes in: a little more, so
that it is not short of training slots. `periodic` ends a phase with its first candidate: one new model for each window,
and about as many steps as `mace`. `periodic-full` goes on until its slots are used up; then its phases last most of a
window, train what arrives meanwhile, and run into each other: it is `continuous` by another name.
"""

import random
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.harness.client import Request
from core.alignment_config import DriftConfig
from core.config import TINY_ASSISTANT
from core.wire import TrainingPair
from engine.tiny.knowledge import Question, Style, held_out_questions, preference_questions, questions, render

_HELD_OUT_SEED = 20_260_101
"""Seed of the rejected styles of held-out pairs: the same set for every seed and policy."""


MODEL_ID = "mace-tiny"
WINDOWS_PER_PHASE = 2
HEADROOM = 1.2
FIRST_CANDIDATE_GAP_S = 0.5
"""Longer than it takes to fetch the next batch, shorter than to judge and publish a candidate."""
_KEPT_VERSIONS = 1000
"""All of them: they are scored after the run."""


class DriftPlan(BaseModel):
    """One run: a phase for each preferred style, a steady rate of pairs, a light stream of requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    styles: tuple[Style, ...] = Field((Style.POLITE, Style.EXPLAINED, Style.ENTHUSIASTIC), min_length=1)
    """Preferred in the first phase, the second, ..."""
    phase_s: float = Field(40.0, gt=0)
    pairs_per_phase: int = Field(140, ge=1)
    requests_per_s: float = Field(3.0, gt=0)
    """Mean rate of chat requests; arrivals are Poisson."""
    num_users: int = Field(8, ge=1)
    """Pairs come from so many users in equal parts."""
    num_held_out: int = Field(120, ge=1)
    """Held-out pairs for each style."""
    poll_s: float = Field(0.5, gt=0)
    """Between two looks at the server's counters."""
    warm_up_s: float = Field(3.0, ge=0)
    """Requests without feedback before the clock starts."""

    @property
    def duration_s(self) -> float:
        """Length of all phases together."""
        return self.phase_s * len(self.styles)

    @property
    def pairs_per_s(self) -> float:
        """Rate at which pairs are posted."""
        return self.pairs_per_phase / self.phase_s

    def phase_at(self, time_s: float) -> int:
        """Index of the phase at a time since the start; times outside belong to the nearest phase."""
        return min(max(int(time_s // self.phase_s), 0), len(self.styles) - 1)


@dataclass(frozen=True, slots=True)
class Ask:
    """A chat request and when it is due."""

    at_s: float
    question: Question


def posts(plan: DriftPlan, seed: int) -> list[Request]:
    """The pairs of a run, as bodies of `POST /v1/feedback`.

    A phase asks each question once before any comes again; the rejected style is random.
    """
    rng = random.Random(f"pairs {seed}")
    made: list[Request] = []
    for phase, style in enumerate(plan.styles):
        asked: list[Question] = []
        for k in range(plan.pairs_per_phase):
            if not asked:
                asked = preference_questions()
                rng.shuffle(asked)
            body = _preference(asked.pop(), style, rng)
            body["user"] = f"user-{k % plan.num_users}"
            at_s = phase * plan.phase_s + (k + 0.5) / plan.pairs_per_s
            made.append(Request("post", body, at_s))
    return made


def asks(plan: DriftPlan, seed: int) -> list[Ask]:
    """The requests of a run, warm-up first (negative times)."""
    rng = random.Random(f"requests {seed}")
    pool = questions()
    made, at_s = [], -plan.warm_up_s
    while (at_s := at_s + rng.expovariate(plan.requests_per_s)) < plan.duration_s:
        made.append(Ask(at_s, rng.choice(pool)))
    return made


def held_out_pairs(plan: DriftPlan, style: Style) -> list[tuple[str, TrainingPair]]:
    """The test set of a style: its reply against one in another style, on facts about which nothing is posted.

    Returns:
        The fact and the pair, for each held-out question.
    """
    rng = random.Random(f"{_HELD_OUT_SEED} {style.value}")
    made = []
    for number, question in enumerate(held_out_questions()[: plan.num_held_out]):
        body = _preference(question, style, rng)
        pair = TrainingPair(f"{style.value}-{number}", body["prompt"], body["chosen"], body["rejected"])
        made.append((question.fact, pair))
    return made


def _preference(question: Question, style: Style, rng: random.Random) -> dict[str, Any]:
    other = rng.choice([one for one in Style if one is not style])
    return {
        "type": "preference",
        "prompt": [{"role": "user", "content": question.text}],
        "chosen": render(question, style),
        "rejected": render(question, other),
        "source": "drift",
    }


class Policy(StrEnum):
    """Rule by which the server decides when to train."""

    MACE = "mace"
    NO_REWARD = "mace-no-reward"
    PERIODIC = "periodic"
    PERIODIC_FULL = "periodic-full"
    CONTINUOUS = "continuous"
    FROZEN = "frozen"


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """The settings of a policy, and its look in tables and pictures."""

    title: str
    colour: str
    """Okabe and Ito's: apart for the colour-blind too."""
    name: str
    """Value of `scheduler.policy`."""
    experiments: dict[str, Any] = field(default_factory=dict)
    dashes: str = "-"


POLICIES = {
    Policy.MACE: PolicyEntry("mace", "#D55E00", "mace"),
    Policy.NO_REWARD: PolicyEntry("mace without γ·L_DPO", "#CC79A7", "mace", {"reward_term": False}, "--"),
    Policy.PERIODIC: PolicyEntry("periodic", "#0072B2", "periodic", {"phase_gap_s": FIRST_CANDIDATE_GAP_S}),
    Policy.PERIODIC_FULL: PolicyEntry("periodic, all slots", "#56B4E9", "periodic"),
    Policy.CONTINUOUS: PolicyEntry("continuous", "#009E73", "continuous"),
    Policy.FROZEN: PolicyEntry("frozen", "#555555", "inference_only", dashes=":"),
}


def sections(policy: Policy, plan: DriftPlan) -> dict[str, dict[str, Any]]:
    """Settings of a run beside those of the config; the same retrain rate for all, `mace` has no use for it."""
    slots_per_s = DriftConfig().alarm_rate * plan.pairs_per_s
    entry = POLICIES[policy]
    return {
        "model": {"model_source": TINY_ASSISTANT, "model_id": MODEL_ID},
        "scheduler": {"policy": entry.name},
        "experiments": {
            **entry.experiments,
            "retrain_rate": HEADROOM * slots_per_s / plan.requests_per_s,
            "period_requests": max(1, round(plan.requests_per_s * plan.phase_s / WINDOWS_PER_PHASE)),
        },
        "profile": {"measure_at_start": False},
        "versions": {"keep": _KEPT_VERSIONS},
    }
