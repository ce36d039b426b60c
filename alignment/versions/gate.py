"""The gate: a candidate adapter goes live only if it is no worse than the live one on pairs it never saw.

Both adapters are scored on the same held-out pairs against the same frozen reference, in two windows: the newest
preferences, and a sample of older ones. Measured are preference accuracy (share of pairs with a margin above zero)
and CLPD, the contrastive log-probability difference of the paper taken over whole sequences: the mean of
`log π(chosen|x) - log π(rejected|x)` in nats. A fall of either refuses the candidate if it is significant in a paired
one-sided test (exact McNemar for accuracy, Wilcoxon's signed ranks for CLPD), or larger than the configured bound: with
few pairs a test has no power, with many a bound would let a sure loss through. So with few pairs one lost pair refuses,
also where CLPD rose on the whole: forgiving that let versions fall by up to 4.5 points
(docs/measurements/quality.md). No correction for several tests: to refuse too often costs a little training, to accept
too often costs users.

The generation check finds a candidate that collapsed: preferences can be satisfied by a model that no longer speaks,
that stops at once, never stops, or repeats itself. The candidate and the live adapter answer the same held-out prompts
greedily; measured are mean length and the share of repeated 3-grams. The distance to the frozen reference is
`KL(candidate || reference)` per token, estimated on the candidate's own answers: the mean of
`log π(y|x) - log π_ref(y|x)` over their tokens.

What is normal there, people have said: they may have asked for answers a quarter as long, or for a form that the
reference would hardly write. So each bound is the wider one of two, around the live adapter's answers and around those
that people chose on the held-out pairs (`ChosenAnswers`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from alignment.intervals import mean_interval, wilson
from core.alignment_config import GateConfig
from core.types import PairScore, TokenizedPair

_TOLERANCE = 1e-9
"""Rounding of the means; far below anything that a preference could move."""
_MAX_SCORE = 1e100
"""Larger numbers count as infinite, so that no mean can overflow."""
MAX_CLPD_DROP = 2.0
"""A fall of the mean CLPD by so many nats refuses a candidate, significant or not. Larger than that of the accuracy, as
pairs that stay right by a smaller distance are no loss yet."""
MIN_GENERATION_TOKENS, MAX_GENERATION_TOKENS = 64, 256
"""Limits of the length of the generation check's answers: long enough to tell an answer that ends from one that does
not, and short enough to wait for."""
_ROOM_FACTOR = 1.5
"""An answer may be longer by this than the longest one that people chose before it is cut off."""
MAX_LENGTH_FACTOR = 3.0
"""Mean length of the candidate's answers against the live adapter's: at most this, at least its inverse."""
MAX_CHOSEN_LENGTH_FACTOR = 2.0
"""The same against the interval of the mean length of what people chose."""
MAX_REPETITION_RISE = 0.3
"""The share of repeated 3-grams may be larger by this than in the live adapter's answers, or in those people chose."""
_CHOSEN_CONFIDENCE = 0.975
"""One-sided, of the intervals of means over chosen answers."""
_GRAM = 3
_LENGTH_PRIOR = 4.0
"""Tokens added to both mean lengths, so that answers of one and of three tokens do not count as a collapse."""


@dataclass(frozen=True, slots=True)
class WindowScores:
    """One window of held-out pairs under both adapters."""

    name: str
    """`recent` or `old`."""
    candidate: Sequence[PairScore]
    live: Sequence[PairScore]


@dataclass(frozen=True, slots=True)
class WindowComparison:
    """Both adapters on one window. Means over `num_pairs` pairs that both adapters were scored on."""

    name: str
    num_pairs: int
    candidate_accuracy: float
    live_accuracy: float
    candidate_clpd: float
    """Nats, as `live_clpd`."""
    live_clpd: float
    candidate_margin: float
    live_margin: float
    candidate_loss: float
    live_loss: float
    p_accuracy: float
    """Chance of so large a fall of accuracy, or a larger one, between two adapters that are equally good."""
    p_clpd: float
    """The same for CLPD."""
    candidate_accuracy_interval: tuple[float, float]
    """Wilson 95 % interval: with few pairs it is wide, and the decision is worth as much."""


@dataclass(frozen=True, slots=True)
class GateDecision:
    """The verdict on one candidate and the numbers behind it."""

    accepted: bool
    reason: str
    windows: tuple[WindowComparison, ...] = ()
    generation: dict[str, float] = field(default_factory=dict)
    """Measurements of the generation check; empty if it did not run."""

    @property
    def num_pairs(self) -> int:
        """Held-out pairs that both adapters were scored on."""
        return sum(window.num_pairs for window in self.windows)

    def metrics(self) -> dict[str, float]:
        """Finite numbers for a manifest: the recent window's under their names, the old one's with `old_` before."""
        numbers: dict[str, float] = {"num_pairs": self.num_pairs, **self.generation}
        for window in self.windows:
            prefix = "" if window.name == "recent" else f"{window.name}_"
            fields = asdict(window)
            numbers |= {prefix + name: value for name, value in fields.items() if isinstance(value, int | float)}
            numbers[f"{prefix}num_pairs"] = window.num_pairs
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def to_wire(self) -> dict[str, Any]:
        """Built-in types only."""
        return {**asdict(self), "num_pairs": self.num_pairs}


def judge_candidate(
    windows: Iterable[WindowScores], config: GateConfig, max_clpd_drop: float = MAX_CLPD_DROP
) -> GateDecision:
    """Compare a candidate with the live adapter on the held-out pairs that the live adapter was scored on.

    With no such pairs there is nothing to compare, and the candidate is accepted, saying so. A candidate that
    lacks a score, or has one that is not finite, is refused: its evaluation failed where the live one's did not.
    """
    compared: list[WindowComparison] = []
    falls: list[str] = []
    for window in windows:
        by_id = {score.pair_id: score for score in window.candidate}
        # A pair that even the live adapter cannot score says nothing about the candidate.
        live = [score for score in {one.pair_id: one for one in window.live}.values() if _is_finite(score)]
        candidate = [by_id[score.pair_id] for score in live if score.pair_id in by_id] if live else by_id.values()
        problem = None
        if len(candidate) < len(live):
            missing = len(live) - len(candidate)
            problem = f"the candidate was not scored on {missing} of {len(live)} held-out pairs"
        elif not all(map(_is_finite, candidate)):
            problem = "the candidate has scores that are not finite"
        if problem is not None:
            return GateDecision(False, f"{problem} ({window.name} pairs)", tuple(compared))
        if live:
            comparison = _compare(window.name, list(candidate), live)
            compared.append(comparison)
            falls += _falls(comparison, config, max_clpd_drop)
    return GateDecision(not falls, _reason(falls, compared), tuple(compared))


def clpd(score: PairScore) -> float:
    """`log π(chosen|x) - log π(rejected|x)` of the whole completions, in nats."""
    return score.policy_chosen_logp - score.policy_rejected_logp


_MEASURES: dict[str, Callable[[PairScore], float]] = {
    "accuracy": lambda score: float(score.margin > 0),
    "clpd": clpd,
    "margin": lambda score: score.margin,
    "loss": lambda score: score.loss,
}


def _compare(name: str, candidate: Sequence[PairScore], live: Sequence[PairScore]) -> WindowComparison:
    means = {
        f"{whose}_{measured}": fmean(map(measure, scores))
        for whose, scores in (("candidate", candidate), ("live", live))
        for measured, measure in _MEASURES.items()
    }
    return WindowComparison(
        name=name,
        num_pairs=len(live),
        p_accuracy=_mcnemar_p(candidate, live),
        p_clpd=_wilcoxon_p([clpd(new) - clpd(old) for new, old in zip(candidate, live, strict=True)]),
        candidate_accuracy_interval=wilson(sum(s.margin > 0 for s in candidate), len(candidate), 0.975),
        **means,
    )


def _mcnemar_p(candidate: Sequence[PairScore], live: Sequence[PairScore]) -> float:
    """Exact one-sided McNemar test: of the pairs on which the two differ, as many or more were lost by chance."""
    both = [(new.margin > 0, old.margin > 0) for new, old in zip(candidate, live, strict=True)]
    lost = sum(old and not new for new, old in both)
    won = sum(new and not old for new, old in both)
    tail = sum(math.comb(lost + won, k) for k in range(lost, lost + won + 1))
    return float(tail / 2 ** (lost + won))


def _wilcoxon_p(differences: Sequence[float]) -> float:
    """One-sided signed-rank test against a fall; 1 if nothing moved."""
    moved = [value for value in differences if abs(value) > _TOLERANCE]
    if not moved:
        return 1.0
    from scipy.stats import wilcoxon

    return float(wilcoxon(moved, alternative="less").pvalue)


def _falls(window: WindowComparison, config: GateConfig, max_clpd_drop: float) -> list[str]:
    """Reasons against the candidate, in words."""
    alpha = 1.0 - config.confidence
    measures = (
        ("preference accuracy", "", window.candidate_accuracy, window.live_accuracy, window.p_accuracy,
         config.max_accuracy_drop),
        ("CLPD", " nats", window.candidate_clpd, window.live_clpd, window.p_clpd, max_clpd_drop),
    )  # fmt: skip
    falls = []
    for name, unit, candidate, live, p, bound in measures:
        is_lower = candidate < live - _TOLERANCE
        if is_lower and (p <= alpha or live - candidate > bound + _TOLERANCE):
            sure = f"p = {p:.3f}, significant at {config.confidence:.0%}" if p <= alpha else f"p = {p:.3f}"
            falls.append(
                f"{name} fell from {live:.3f} to {candidate:.3f}{unit} on {window.num_pairs} {window.name} "
                f"pairs ({sure}; allowed {bound:g})"
            )
    return falls


def _reason(falls: Sequence[str], compared: Sequence[WindowComparison]) -> str:
    if falls:
        return " and ".join(falls)
    if not compared:
        return "no held-out pair with a score of the live adapter, nothing to compare"
    return "; ".join(
        f"accuracy {window.candidate_accuracy:.3f} (live {window.live_accuracy:.3f}), CLPD {window.candidate_clpd:.2f} "
        f"({window.live_clpd:.2f}) on {window.num_pairs} {window.name} held-out pairs"
        for window in compared
    )


@dataclass(frozen=True, slots=True)
class ChosenAnswers:
    """What people chose on the held-out pairs, as far as a candidate's own answers can be compared with it."""

    length: float
    """Mean length in tokens; of this and the others, as far as `generation_tokens` goes."""
    length_interval: tuple[float, float]
    """Of that mean (95 %), within the lengths that were chosen."""
    rejected_length: float
    """Mean length of the answers that were rejected."""
    repetition: float
    """Share of 3-grams that came before in the same answer."""
    surprise: float
    """Nats per token that these answers are from the frozen reference, upper bound of the mean over pairs. A model that
    answers like this cannot be nearer to the reference in KL than by its own entropy."""


def generation_tokens(pairs: Iterable[TokenizedPair]) -> int:
    """The length, in tokens, at which answers of the generation check are cut off, given held-out pairs."""
    longest = max((len(pair.chosen_ids) for pair in pairs), default=0)
    return min(max(math.ceil(_ROOM_FACTOR * longest), MIN_GENERATION_TOKENS), MAX_GENERATION_TOKENS)


def chosen_answers(pairs: Sequence[TokenizedPair], scores: Iterable[PairScore]) -> ChosenAnswers:
    """Measure the chosen answers of held-out pairs, at least one; `scores` are theirs, of any adapter."""
    limit = generation_tokens(pairs)
    chosen = [pair.chosen_ids[:limit] for pair in pairs]
    num_tokens = {pair.pair_id: len(pair.chosen_ids) for pair in pairs}
    rates = [
        -score.reference_chosen_logp / num_tokens[score.pair_id]
        for score in scores
        if _is_finite(score) and num_tokens.get(score.pair_id)
    ]
    lengths = [float(len(ids)) for ids in chosen]
    return ChosenAnswers(
        length=fmean(lengths),
        length_interval=mean_interval(lengths, _CHOSEN_CONFIDENCE),
        rejected_length=fmean(len(pair.rejected_ids[:limit]) for pair in pairs),
        repetition=repetition(chosen),
        surprise=mean_interval(rates, _CHOSEN_CONFIDENCE)[1] if rates else 0.0,
    )


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """The measurements over all prompts, by their names in a manifest."""

    generation_length: float
    """Mean length of the candidate's answers in tokens."""
    live_generation_length: float
    generation_repetition: float
    """Share of 3-grams that came before in the same answer of the candidate."""
    live_generation_repetition: float
    generation_kl: float
    """Nats per token; NaN if no answer could be scored."""
    chosen: ChosenAnswers

    def problems(self, config: GateConfig) -> list[str]:
        """Reasons against the candidate, in words; empty if there is none."""
        found = []
        length, live_length = self.generation_length, self.live_generation_length
        shortest, longest = self._length_bounds()
        if not shortest <= length <= longest:
            low, high = self.chosen.length_interval
            found.append(
                f"answers are {length:.1f} tokens long (live {live_length:.1f}; people chose {self.chosen.length:.1f} "
                f"[{low:.1f}, {high:.1f}] over {self.chosen.rejected_length:.1f})"
            )
        repeated = self.generation_repetition
        live_repeated, chosen_repeated = self.live_generation_repetition, self.chosen.repetition
        if repeated - max(live_repeated, chosen_repeated) > MAX_REPETITION_RISE:
            found.append(
                f"{repeated:.0%} of 3-grams are repetitions (live {live_repeated:.0%}, chosen {chosen_repeated:.0%})"
            )
        allowed = max(config.max_kl, self.chosen.surprise)
        if not self.generation_kl <= allowed:
            found.append(
                f"KL to the reference is {self.generation_kl:.2f} nats per token on its own answers, "
                f"allowed {allowed:.3g}"
            )
        return found

    def _length_bounds(self) -> tuple[float, float]:
        """Mean lengths between these are no reason against the candidate."""
        live, (low, high) = self.live_generation_length, self.chosen.length_interval
        near_live = MAX_LENGTH_FACTOR, live + _LENGTH_PRIOR, live + _LENGTH_PRIOR
        near_chosen = MAX_CHOSEN_LENGTH_FACTOR, low + _LENGTH_PRIOR, high + _LENGTH_PRIOR
        shortest = min(lower / factor for factor, lower, _ in (near_live, near_chosen))
        longest = max(upper * factor for factor, _, upper in (near_live, near_chosen))
        return shortest - _LENGTH_PRIOR, longest - _LENGTH_PRIOR

    def metrics(self) -> dict[str, float]:
        """Finite numbers for a manifest."""
        own = {name: value for name, value in asdict(self).items() if name != "chosen"}
        numbers = own | {f"chosen_{name}": value for name, value in asdict(self.chosen).items()}
        return {
            name: value for name, value in numbers.items() if isinstance(value, float) and math.isfinite(value)
        }


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
    chosen: ChosenAnswers,
) -> GenerationReport:
    """Compare the answers of both (token ids, by prompt) with each other and with what people chose.

    `scored` are the `pairs_to_score` of the candidate's answers, and `scores` their scores, in the same order.
    """
    mean_length, live_mean_length = (fmean(map(len, texts)) if texts else 0.0 for texts in (candidate, live))
    num_tokens = sum(len(pair.chosen_ids) for pair in scored)
    excess = math.fsum(score.policy_chosen_logp - score.reference_chosen_logp for score in scores)
    return GenerationReport(
        generation_length=mean_length,
        live_generation_length=live_mean_length,
        generation_repetition=repetition(candidate),
        live_generation_repetition=repetition(live),
        generation_kl=excess / num_tokens if num_tokens else math.nan,
        chosen=chosen,
    )


def repetition(answers: Sequence[Sequence[int | str]], length: int = _GRAM) -> float:
    """Share of the runs of `length` tokens or words in all answers that came before in the same answer, 0 to 1."""
    total = distinct = 0
    for answer in answers:
        grams = [tuple(answer[i : i + length]) for i in range(len(answer) - length + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return (total - distinct) / total if total else 0.0


def _is_finite(score: PairScore) -> bool:
    numbers = (score.loss, score.margin, score.policy_chosen_logp, score.policy_rejected_logp)
    return all(abs(number) < _MAX_SCORE for number in numbers)
