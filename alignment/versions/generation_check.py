"""The generation check of the gate: does a candidate still write answers, or has it collapsed?

Preferences can be satisfied by a model that no longer speaks: one that stops at once, never stops, or repeats itself.
The candidate and the live adapter answer the same held-out prompts greedily; compared are mean length and the share of
repeated 3-grams. The distance to the frozen reference is `KL(candidate || reference)` per token, estimated on the
candidate's own answers: the mean of `log π(y|x) - log π_ref(y|x)` over their tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.alignment_config import GateConfig
from core.types import PairScore, TokenizedPair

_N = 3
_LENGTH_PRIOR = 4.0
"""Tokens added to both mean lengths, so that answers of one and of three tokens do not count as a collapse."""


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What was measured over the prompts."""

    candidate_length: float
    """Mean answer length in tokens, as `live_length`."""
    live_length: float
    candidate_repetition: float
    """Share of 3-grams that came before in the same answer, as `live_repetition`."""
    live_repetition: float
    kl: float
    """Nats per token; NaN if no answer could be scored."""

    def problems(self, config: GateConfig) -> list[str]:
        """What speaks against the candidate, in words; empty if nothing does."""
        found = []
        ratio = (self.candidate_length + _LENGTH_PRIOR) / (self.live_length + _LENGTH_PRIOR)
        if not 1 / config.max_length_factor <= ratio <= config.max_length_factor:
            found.append(f"answers are {self.candidate_length:.1f} tokens long (live {self.live_length:.1f})")
        if self.candidate_repetition - self.live_repetition > config.max_repetition_rise:
            found.append(
                f"{self.candidate_repetition:.0%} of 3-grams are repetitions (live {self.live_repetition:.0%})"
            )
        if not self.kl <= config.max_kl:
            found.append(
                f"KL to the reference is {self.kl:.2f} nats per token on its own answers, allowed {config.max_kl:g}"
            )
        return found

    def metrics(self) -> dict[str, float]:
        """For the manifest."""
        numbers = {
            "generation_length": self.candidate_length,
            "live_generation_length": self.live_length,
            "generation_repetition": self.candidate_repetition,
            "live_generation_repetition": self.live_repetition,
            "generation_kl": self.kl,
        }
        return {name: value for name, value in numbers.items() if math.isfinite(value)}


def pairs_to_score(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], max_length_tokens: int
) -> list[TokenizedPair]:
    """The candidate's answers as chosen completions, for the trainer to score; an empty answer has no score.

    The rejected side is only there because a pair has two: one token that the answer does not begin with.
    """
    pairs = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        chosen = tuple(answer[: max(0, max_length_tokens - len(prompt))])
        if chosen:
            pairs.append(TokenizedPair(f"generation-{index}", tuple(prompt), chosen, (int(chosen[0] == 0),)))
    return pairs


def report_generation(
    candidate: Sequence[Sequence[int]],
    live: Sequence[Sequence[int]],
    scored: Sequence[TokenizedPair],
    scores: Sequence[PairScore],
) -> GenerationReport:
    """Put the measurements together.

    Args:
        candidate: its answers as token ids, by prompt.
        live: the live adapter's answers to the same prompts.
        scored: `pairs_to_score` of the candidate's answers.
        scores: their scores, in the same order.
    """
    num_tokens = sum(len(pair.chosen_ids) for pair in scored)
    excess = math.fsum(score.policy_chosen_logp - score.reference_chosen_logp for score in scores)
    return GenerationReport(
        candidate_length=_mean_length(candidate),
        live_length=_mean_length(live),
        candidate_repetition=repetition(candidate),
        live_repetition=repetition(live),
        kl=excess / num_tokens if num_tokens else math.nan,
    )


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """Share of the 3-grams of all answers that came before in the same answer; 0 if there is none."""
    total = distinct = 0
    for answer in answers:
        grams = [tuple(answer[i : i + _N]) for i in range(len(answer) - _N + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return (total - distinct) / total if total else 0.0


def _mean_length(answers: Sequence[Sequence[int]]) -> float:
    return sum(map(len, answers)) / len(answers) if answers else 0.0
