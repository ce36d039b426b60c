"""What KV pruning costs in accuracy on one model, and whether that allows switching it on. One JSON file.

`mace profile pruning` measures and writes the report; the engine reads it when it starts and asks `decide`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.config import KvPruningConfig, ModelConfig
from core.errors import ProfileError
from core.files import write_atomically
from engine.pruning.tasks import RecallKind
from profiler.profile import Origin, profile_path

MIN_PASSAGES = 20
"""Passages that the log-prob must be measured on."""
MIN_QUESTIONS = 50
"""Questions of a kind; one of them is then no more than the default `max_accuracy_drop`."""
MIN_SKILL = 0.2
"""Share of the questions, above what guessing gives, that the unpruned model must answer for a task to count."""
_CONFIDENCE = 0.95

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Estimate(_Model):
    """A mean over independent contexts and its 95 % interval (Student's t)."""

    mean: _Finite
    low: _Finite
    high: _Finite
    num_samples: int = Field(ge=2)


class TaskBaseline(_Model):
    """What the model answers when nothing is pruned."""

    num_questions: int = Field(ge=1)
    accuracy: _Share
    guess_accuracy: _Share
    """Of a reader who knows the form of the answer but not which one it is."""

    @property
    def is_solved(self) -> bool:
        """Whether the model can do enough of this task for a loss to show."""
        return self.accuracy - self.guess_accuracy >= MIN_SKILL * (1 - self.guess_accuracy)


class RecallResult(_Model):
    """The same questions after pruning."""

    accuracy: _Share
    drop: Estimate
    """Accuracy unpruned minus pruned, by context; negative: better with pruning."""


class FractionResult(_Model):
    """One fraction of pruning."""

    fraction: float = Field(ge=0, le=0.9)
    logprob_drop: Estimate
    """Nats per token of what follows the context; positive: pruning made it less likely."""
    tasks: dict[RecallKind, RecallResult]
    dropped_blocks: float = Field(ge=0)
    """Mean over all contexts; fewer than asked for where sinks and recent window leave no more."""
    total_blocks: float = Field(gt=0)


class PruningReport(_Model):
    """Everything that `mace profile pruning` measured."""

    schema_version: Literal[1] = 1
    origin: Origin
    model_source: str = Field(min_length=1)
    adapter: str | None = None
    """Directory of the adapter that was on; None: the base model."""
    method: str
    block_tokens: int = Field(ge=1)
    sink_tokens: int = Field(ge=1)
    recent_tokens: int = Field(ge=1)
    context_tokens: float = Field(gt=0)
    """Mean length of the contexts."""
    dataset: str | None = None
    """Where the passages of the log-prob come from; None: generated."""
    num_skipped: int = Field(0, ge=0)
    """Passages that were too short to drop a block."""
    baseline: dict[RecallKind, TaskBaseline]
    baseline_nats_per_token: _Finite
    """Mean negative log-prob of the continuations, unpruned."""
    fractions: tuple[FractionResult, ...] = Field(min_length=1)
    elapsed_s: float = Field(ge=0)

    def save(self, path: Path) -> None:
        """Write as JSON; a reader sees the old file or the new one, never a part.

        Raises:
            ProfileError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, self.model_dump_json(indent=1))
        except OSError as error:
            raise ProfileError(f"cannot write pruning report {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "PruningReport":
        """Read what `save` wrote.

        Raises:
            ProfileError: no such file, no JSON, an unknown schema version, or wrong or missing fields.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"cannot read pruning report {path}: {error.strerror}") from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise ProfileError(
                f"pruning report {path} is damaged or of another version. Measure it again: mace profile pruning"
            ) from error


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether pruning may switch on, and why or why not: one sentence."""

    allowed: bool
    reason: str


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
    path: Path | None, config: KvPruningConfig, model: ModelConfig, block_tokens: int | None = None
) -> Decision:
    """`decide` on the report in a file; one that cannot be read is a reason to refuse, not an error."""
    try:
        report = PruningReport.load(path) if path is not None and path.exists() else None
    except ProfileError as error:
        if config.require_gate:
            return _refuse(str(error))
        report = None
    return decide(report, config, model, block_tokens)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of independent values, two or more.

    Raises:
        ProfileError: there are fewer than two, or one is not finite.
    """
    from scipy.stats import t

    count = len(values)
    if count < 2 or not all(map(math.isfinite, values)):
        raise ProfileError(f"pruning: {count} samples, or values that are not finite, give no interval")
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * math.sqrt(variance / count)
    return Estimate(mean=mean, low=mean - half, high=mean + half, num_samples=count)


def decide(
    report: PruningReport | None, config: KvPruningConfig, model: ModelConfig, block_tokens: int | None = None
) -> Decision:
    """Whether `report` shows that pruning as configured stays within its bounds.

    The log-prob passes if the upper end of its interval is within `max_logprob_drop`; every task that the unpruned
    model can do passes if its mean drop is within `max_accuracy_drop`. What was measured must be at least as hard as
    what is configured: the same model, method and block size, no larger protected parts, no smaller fraction.

    Args:
        report: None if nothing was measured.
        config: `kv_pruning` of the settings; `start` plays no part.
        model: `model` of the settings.
        block_tokens: of the engine; None: not compared.
    """
    if not config.require_gate:
        return Decision(True, "kv_pruning.require_gate is off: switched on without looking at accuracy")
    if report is None:
        return _refuse("its accuracy was not measured on this model. Run: mace profile pruning")
    if problem := _mismatch(report, config, model, block_tokens):
        return _refuse(f"{problem}. Run again: mace profile pruning")
    measured = [result for result in report.fractions if result.fraction >= config.max_fraction - 1e-9]
    if not measured:
        largest = max(result.fraction for result in report.fractions)
        return _refuse(
            f"kv_pruning.max_fraction is {config.max_fraction:g}, measured was up to {largest:g}. "
            f"Run: mace profile pruning --fractions {config.max_fraction:g}"
        )
    return _judge(report, min(measured, key=lambda result: result.fraction), config)


def _refuse(reason: str) -> Decision:
    return Decision(False, f"KV pruning stays off: {reason}")


def _mismatch(
    report: PruningReport, config: KvPruningConfig, model: ModelConfig, block_tokens: int | None
) -> str | None:
    if (report.origin.model, report.model_source) != (model.model_id, model.model_source):
        return (
            f"the report is of {report.origin.model} ({report.model_source}), "
            f"not of {model.model_id} ({model.model_source})"
        )
    if report.method != config.method:
        return f"the report is of method {report.method}, kv_pruning.method is {config.method}"
    if block_tokens is not None and report.block_tokens != block_tokens:
        return f"the report is of blocks of {report.block_tokens} tokens, the engine has {block_tokens}"
    for name in ("sink_tokens", "recent_tokens"):
        if getattr(report, name) > getattr(config, name):
            return f"the report kept {name} = {getattr(report, name)}, kv_pruning keeps {getattr(config, name)}"
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
