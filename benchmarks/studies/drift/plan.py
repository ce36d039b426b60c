"""What happens in a run, drawn before it starts: who prefers what, which pairs are posted when, what is asked.

Everything depends on the plan and the seed alone, so every policy meets the same pairs and requests at the same times.
"""

import random
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from core.wire import TrainingPair
from engine.tiny.knowledge import Question, Style, held_out_questions, preference_questions, questions, render

_HELD_OUT_SEED = 20_260_101
"""Which style is the rejected one of a held-out pair: the same set for every seed and policy."""


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
        """Of all phases."""
        return self.phase_s * len(self.styles)

    @property
    def pairs_per_s(self) -> float:
        """Rate at which pairs are posted."""
        return self.pairs_per_phase / self.phase_s

    def phase_at(self, time_s: float) -> int:
        """Index of the phase at a time since the start; times outside belong to the nearest phase."""
        return min(max(int(time_s // self.phase_s), 0), len(self.styles) - 1)


@dataclass(frozen=True, slots=True)
class Post:
    """A body of `POST /v1/feedback` and when it is due."""

    at_s: float
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """A chat request and when it is due."""

    at_s: float
    question: Question


@dataclass(frozen=True, slots=True)
class HeldOutPair:
    """A pair on a fact about which no preference is ever posted."""

    fact: str
    pair: TrainingPair


def posts(plan: DriftPlan, seed: int) -> list[Post]:
    """The pairs of a run. A phase asks each question once before any comes again; the rejected style is random."""
    rng = random.Random(f"pairs {seed}")
    made: list[Post] = []
    for phase, style in enumerate(plan.styles):
        asked: list[Question] = []
        for k in range(plan.pairs_per_phase):
            if not asked:
                asked = preference_questions()
                rng.shuffle(asked)
            body = _preference(asked.pop(), style, rng)
            body["user"] = f"user-{k % plan.num_users}"
            made.append(Post(phase * plan.phase_s + (k + 0.5) / plan.pairs_per_s, body))
    return made


def asks(plan: DriftPlan, seed: int) -> list[Ask]:
    """The requests of a run, warm-up first (negative times)."""
    rng = random.Random(f"requests {seed}")
    pool = questions()
    made, at_s = [], -plan.warm_up_s
    while (at_s := at_s + rng.expovariate(plan.requests_per_s)) < plan.duration_s:
        made.append(Ask(at_s, rng.choice(pool)))
    return made


def held_out_pairs(plan: DriftPlan, style: Style) -> list[HeldOutPair]:
    """The test set of a style: its reply against one in another style, on held-out questions."""
    rng = random.Random(f"{_HELD_OUT_SEED} {style.value}")
    made = []
    for number, question in enumerate(held_out_questions()[: plan.num_held_out]):
        body = _preference(question, style, rng)
        pair = TrainingPair(f"{style.value}-{number}", body["prompt"], body["chosen"], body["rejected"])
        made.append(HeldOutPair(question.fact, pair))
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
