"""The accuracy gate of KV pruning: a report of what pruning costs on one model, and the decision to switch it on.

`mace profile pruning` measures and writes the report, one JSON file; an executor reads it when it starts and asks
`decide_from_file`.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from core.config import KV_PRUNING_SINK_TOKENS, KvPruningConfig, ModelConfig
from core.errors import ProfileError
from core.fingerprint import differing_parts
from engine.pruning.tasks import RecallKind
from profiler.profile import FrozenModel, MeasuredFile, Origin, profile_path

METHOD = "keydiff"
"""Name of the rule that scores blocks (`engine.pruning.scores`)."""
MIN_PASSAGES = 20
"""Passages that the log-prob must be measured on."""
MIN_QUESTIONS = 50
"""Questions of a kind; one of them is then no more than the default `max_accuracy_drop`."""
MIN_SKILL = 0.2
"""Share of the questions, above what guessing gives, that the unpruned model must answer for a kind to count."""
_CONFIDENCE = 0.95

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]


class Estimate(FrozenModel):
    """A mean over independent contexts and its 95 % interval (Student's t)."""

    mean: _Finite
    low: _Finite
    high: _Finite
    num_samples: int = Field(ge=2)


class RecallBaseline(FrozenModel):
    """Answers to questions of one kind when nothing is pruned."""

    num_questions: int = Field(ge=1)
    accuracy: _Share
    guess_accuracy: _Share
    """Accuracy of a reader who knows the form of the answer but not which one it is."""

    @property
    def is_solved(self) -> bool:
        """The model answers enough of these questions for a loss to show."""
        return self.accuracy - self.guess_accuracy >= MIN_SKILL * (1 - self.guess_accuracy)


class RecallResult(FrozenModel):
    """Answers to the same questions after pruning."""

    accuracy: _Share
    drop: Estimate
    """Accuracy unpruned minus pruned, by context; negative: better with pruning."""


class FractionResult(FrozenModel):
    """Costs of pruning this fraction of the blocks."""

    fraction: float = Field(ge=0, le=0.9)
    logprob_drop: Estimate
    """Nats per token of what follows the context; positive: pruning made it less likely."""
    tasks: dict[RecallKind, RecallResult]
    dropped_blocks: float = Field(ge=0)
    """Mean over all contexts; fewer than asked for where sinks and recent window leave no more."""
    total_blocks: float = Field(gt=0)


class PruningReport(MeasuredFile):
    """Everything that `mace profile pruning` measured."""

    title: ClassVar[str] = "pruning report"
    command: ClassVar[str] = "mace profile pruning"
    origin: Origin
    model_source: str = Field(min_length=1)
    fingerprint: str = ""
    """The model by its content; empty: measured before there were fingerprints, so its names count."""
    adapter: str | None = None
    """Directory of the adapter that was on; None: the base model."""
    method: str
    """`METHOD`; reports of older versions may have another one, which is refused."""
    block_tokens: int = Field(ge=1)
    sink_tokens: int = Field(ge=1)
    recent_tokens: int = Field(ge=1)
    context_tokens: float = Field(gt=0)
    """Mean length of the contexts."""
    dataset: str | None = None
    """Source of the passages of the log-prob; None: generated."""
    num_skipped: int = Field(0, ge=0)
    """Passages that were too short to drop a block."""
    baseline: dict[RecallKind, RecallBaseline]
    baseline_nats_per_token: _Finite
    """Mean negative log-prob of the continuations, unpruned."""
    fractions: tuple[FractionResult, ...] = Field(min_length=1)
    elapsed_s: float = Field(ge=0)


@dataclass(frozen=True, slots=True)
class Decision:
    """Verdict on pruning: it may switch on or not."""

    allowed: bool
    reason: str
    """One sentence."""


def pruning_report_path(state_dir: Path, device: str, model_id: str) -> Path:
    """Beside the latency profile: `state_dir/profiles/<device>/<model>.pruning.json`."""
    path = profile_path(state_dir, device, model_id)
    return path.with_name(f"{path.stem}.pruning.json")


def find_report(state_dir: Path, device: str, model_id: str) -> Path | None:
    """The report of this device; else the newest of another one, since accuracy hardly depends on the device."""
    wanted = pruning_report_path(state_dir, device, model_id)
    if wanted.exists():
        return wanted
    others = wanted.parent.parent.glob(f"*/{wanted.name}")
    return max(others, key=lambda path: path.stat().st_mtime, default=None)


def decide_from_file(
    path: Path | None,
    config: KvPruningConfig,
    model: ModelConfig,
    block_tokens: int | None = None,
    fingerprint: str = "",
) -> Decision:
    """`decide` on the report in a file; one that cannot be read is a reason to refuse, not an error."""
    report = None
    try:
        if path is not None and path.exists() and config.require_gate:
            report = PruningReport.load(path)
    except ProfileError as error:
        return _refuse(str(error))
    return decide(report, config, model, block_tokens, fingerprint)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of independent values; ProfileError if there are fewer than two, or one is not finite."""
    from scipy.stats import t

    count = len(values)
    if count < 2 or not all(map(math.isfinite, values)):
        raise ProfileError(f"pruning: {count} samples, or values that are not finite, give no interval")
    mean = statistics.fmean(values)
    half = float(t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean=mean, low=mean - half, high=mean + half, num_samples=count)


def decide(
    report: PruningReport | None,
    config: KvPruningConfig,
    model: ModelConfig,
    block_tokens: int | None = None,
    fingerprint: str = "",
) -> Decision:
    """Decide whether `report` shows that pruning as configured stays within its bounds.

    The log-prob passes if the upper end of its interval is within `max_logprob_drop`; every kind of question that the
    unpruned model can answer passes if its mean drop is within `max_accuracy_drop`. What was measured must be at least
    as hard as what is configured: the same model, method and block size, no larger protected parts, no smaller
    fraction. `report` is None if nothing was measured; a `block_tokens` of None is not compared. Models are the same by
    their fingerprints, or by their names where one is not known.
    """
    if not config.require_gate:
        return Decision(True, "kv_pruning.require_gate is off: switched on without looking at accuracy")
    if report is None:
        return _refuse("its accuracy was not measured on this model. Run: mace profile pruning")
    if problem := _mismatch(report, config, model, block_tokens, fingerprint):
        return _refuse(f"{problem}. Run again: mace profile pruning")
    measured = [result for result in report.fractions if result.fraction >= config.max_fraction - 1e-9]
    if not measured:
        largest = max(result.fraction for result in report.fractions)
        return _refuse(
            f"kv_pruning.max_fraction is {config.max_fraction:g}, measured was up to {largest:g}. "
            "Run again: mace profile pruning"
        )
    return _judge(report, min(measured, key=lambda result: result.fraction), config)


def _refuse(reason: str) -> Decision:
    return Decision(False, f"KV pruning stays off: {reason}")


def _mismatch(
    report: PruningReport, config: KvPruningConfig, model: ModelConfig, block_tokens: int | None, fingerprint: str
) -> str | None:
    if report.fingerprint and fingerprint:
        if differing := differing_parts(report.fingerprint, fingerprint):
            return f"the report is of another {model.model_id}, whose {differing} differed"
    elif (report.origin.model, report.model_source) != (model.model_id, model.model_source):
        return (
            f"the report is of {report.origin.model} ({report.model_source}), "
            f"not of {model.model_id} ({model.model_source})"
        )
    if report.method != METHOD:
        return f"the report is of method {report.method}, blocks are scored by {METHOD}"
    if block_tokens is not None and report.block_tokens != block_tokens:
        return f"the report is of blocks of {report.block_tokens} tokens, the engine has {block_tokens}"
    if report.sink_tokens > KV_PRUNING_SINK_TOKENS:
        return f"the report kept the first {report.sink_tokens} tokens, the engine keeps {KV_PRUNING_SINK_TOKENS}"
    if report.recent_tokens > config.recent_tokens:
        return f"the report kept the last {report.recent_tokens} tokens, the engine keeps {config.recent_tokens}"
    return None


def _judge(report: PruningReport, result: FractionResult, config: KvPruningConfig) -> Decision:
    drop = result.logprob_drop
    where = f"at {result.fraction:.0%}"
    if result.dropped_blocks <= 0 or result.dropped_blocks + 1 <= config.max_fraction * result.total_blocks:
        share = result.dropped_blocks / result.total_blocks
        return _refuse(f"contexts were too short: {where} only {share:.0%} of the blocks could be dropped")
    if drop.num_samples < MIN_PASSAGES:
        return _refuse(f"the log-prob was measured on {drop.num_samples} passages, {MIN_PASSAGES} are needed")
    if drop.high > config.max_logprob_drop:
        return _refuse(
            f"{where} it costs {drop.mean:.3f} nats per token, with 95 % confidence up to {drop.high:.3f}; "
            f"kv_pruning.max_logprob_drop is {config.max_logprob_drop:g}"
        )
    notes = []
    for kind, baseline in report.baseline.items():
        if not baseline.is_solved:
            notes.append(
                f"{kind} says nothing, the model answers {baseline.accuracy:.0%} unpruned where guessing gives "
                f"{baseline.guess_accuracy:.0%}"
            )
            continue
        if baseline.num_questions < MIN_QUESTIONS:
            return _refuse(f"{kind} had {baseline.num_questions} questions, {MIN_QUESTIONS} are needed")
        lost = result.tasks[kind].drop.mean
        if lost > config.max_accuracy_drop:
            return _refuse(
                f"{where} it costs {lost:.1%} of the {kind} answers (of {baseline.accuracy:.0%}); "
                f"kv_pruning.max_accuracy_drop is {config.max_accuracy_drop:g}"
            )
        notes.append(f"{lost:.1%} of the {kind} answers")
    costs = "; ".join([f"{drop.mean:.3f} nats per token (up to {drop.high:.3f})", *notes])
    return Decision(True, f"measured {where}: {costs}")
