"""The parts of `mace bench memory`: each is a table of cases x settings, with a few windows in every cell.

A case is what the traffic is like, a setting is what the engine may do; each setting has an engine, and all settings
meet the same requests. Windows of a case follow each other, and the setting that is first changes from turn to turn.
A part is summarized as rows (medians of a cell), and ratios of each setting to the part's baseline from windows that
were measured side by side.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from benchmarks.harness.jobs import TRACES, Job, calibrate_rate, with_rate, with_section
from benchmarks.harness.report import note
from benchmarks.harness.results import progress_line, summary_row
from benchmarks.harness.statistics import center_of, mean, ratio_of
from benchmarks.studies.memory.windows import EnginePool, WindowResult, measure_capacity
from core.errors import ConfigError
from engine.pruning.gate import PruningReport
from simulator.trace import Trace, Uniform

OVERLAPS = (0.0, 0.05, 0.2, 0.36, 0.6)
"""Shares of the prompt tokens that belong to a system prompt; 0.05 and 0.36 are the ends of what the paper found."""
LOW_OVERLAP = 0.05
"""Here sharing must cost nothing measurable; measured twice as often."""
CHECK_CONFIDENCE = 0.99
"""Confidence of the intervals that checks use: seven are checked at once, and one in twenty would fail by chance."""
CONTEXTS = (512, 1024, 2048)
"""Lengths in tokens for which the largest batch is searched."""
LOADS = (1.0, 1.5)
"""Factors of the trace's rate."""
ABLATION_SYSTEM_TOKENS = 432
"""36 % of a mean prompt of the trace, the upper end of what the paper found."""

_LATENCIES = ("ttft_p50_s", "ttft_p99_s", "tbt_p50_s", "tbt_p99_s")
_WARM_UP_S = 3.0
"""Before each window: the engine is warm, the prefix cache is not."""


class MemoryOptions(BaseModel):
    """Choices of the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = 10.0
    repeats: int = 6
    rate_per_s: float | None = None
    """None: calibrated (prefix), or as the trace says (the others)."""
    busy_share: float = 0.6
    """Busy share that calibration aims at."""
    soak_minutes: float = 30.0
    pruning_report: Path | None = None
    """Report of `mace profile pruning`, to be shown beside the gains."""


class Journal:
    """Results that are done, in a file: a run that was cut off goes on where it stopped.

    One JSON object a line: key, fingerprint of what was measured, result. Without a path nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        """Read what is there.

        Raises:
            ConfigError: the file cannot be read, or is no journal.
        """
        self._path = path
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
            entries = [json.loads(line) for line in lines]
            self._results = {(entry["key"], entry["fingerprint"]): entry["result"] for entry in entries}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no journal of this benchmark: {error}") from error

    async def once(self, key: str, settings: Any, measure: Callable[[], Awaitable[Any]]) -> Any:
        """Return the result that was measured under these settings, or measure it; then it is on disk.

        Raises:
            ConfigError: the file cannot be written.
        """
        fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        if (key, fingerprint) in self._results:
            return self._results[key, fingerprint]
        result = self._results[key, fingerprint] = await measure()
        if self._path is not None:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "fingerprint": fingerprint, "result": result}) + "\n")
            except OSError as error:
                raise ConfigError(f"cannot write {self._path}: {error}") from error
        return result


@dataclass(frozen=True, slots=True)
class Case:
    """Traffic that every setting meets."""

    name: str
    columns: Mapping[str, Any]
    """Its columns in rows of the report."""
    trace: Trace
    system_tokens: int = 0
    """Length of the system prompt that a request shares with others."""
    times: int = 1
    """Windows for each of the others'."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An engine."""

    name: str
    columns: Mapping[str, Any]
    shares: bool = True
    """True if prefix caching is on."""
    fraction: float = 0.0
    """Share of a request's KV blocks that may be dropped under memory pressure. The accuracy gate is not asked: the
    weights are random."""

    def job(self, trace: Trace, model_dir: Path) -> Job:
        """Return the window of this trace on the model for long contexts, with this engine's options."""
        kwargs = {**trace.args.engine.engine_kwargs, "enable_prefix_caching": self.shares}
        trace = with_section(trace, "engine", engine_kwargs=kwargs)
        if self.fraction:
            pruning = {"start": "memory_pressure", "max_fraction": self.fraction, "require_gate": False}
            trace = with_section(trace, "kv_pruning", **pruning)
        seconds = trace.duration_s or 10.0
        return Job(model="long", model_dir=model_dir, trace=trace, window_s=seconds, warm_up_s=_WARM_UP_S)


SHARING = (Setting("sharing off", {"sharing": "off"}, shares=False), Setting("sharing on", {"sharing": "on"}))
PRUNING = tuple(Setting(f"pruning {f:.0%}", {"fraction": f}, fraction=f) for f in (0.0, 0.1, 0.25, 0.5))
FULL = Setting("MACE", {"setting": "MACE"}, fraction=0.25)
ABLATIONS = (
    FULL,
    Setting("/Prefix", {"setting": "/Prefix"}, shares=False, fraction=0.25),
    Setting("/Prune", {"setting": "/Prune"}),
    Setting("/Prefix/Prune", {"setting": "/Prefix/Prune"}, shares=False),
)
"""With everything, and without each mechanism, as in the paper's Fig. 12."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One window."""

    case: Case
    setting: Setting
    repeat: int
    job: Job


Measured = Sequence[tuple[Cell, WindowResult]]
Pairs = Sequence[tuple[WindowResult, WindowResult]]
"""Windows that were measured side by side."""


@dataclass(frozen=True, slots=True)
class Part:
    """A table of measurements; see the module docstring."""

    name: str
    trace: Trace
    cases: Sequence[Case]
    settings: Sequence[Setting]
    """The first one is the baseline."""
    ratios: str
    """Key of the comparisons in the report."""
    compared: Sequence[str]
    """Metrics that are compared."""

    def plan(self, model_dir: Path, repeats: int) -> list[Cell]:
        """All windows in their order; each repeat has other arrivals and prompts."""
        cells: list[Cell] = []
        for repeat in range(repeats * max(case.times for case in self.cases)):
            for position, case in enumerate(self.cases):
                if repeat < repeats * case.times:
                    turn = 1 if (repeat + position) % 2 == 0 else -1
                    trace = case.trace.model_copy(update={"seed": case.trace.seed + repeat})
                    settings = self.settings[::turn]
                    cells += [Cell(case, setting, repeat, setting.job(trace, model_dir)) for setting in settings]
        return cells

    async def measure(self, pool: EnginePool, options: MemoryOptions, journal: Journal) -> Measured:
        """Run all windows, or take them from the journal. TrainingError if no fine-tune step succeeds."""
        done = []
        for cell in self.plan(pool.model_dir, options.repeats):
            key = f"{self.name}/{cell.case.name}/{cell.setting.name}/{cell.repeat}"

            async def run(cell: Cell = cell) -> Any:
                found = await pool.measure(cell.setting.name, cell.job, cell.case.system_tokens)
                return found.model_dump(mode="json")

            settings = {"job": settings_of(cell.job), "system_tokens": cell.case.system_tokens}
            result = WindowResult.model_validate(await journal.once(key, settings, run))
            counts = result.counts
            note(
                f"{key}: {progress_line(result.metrics)}, hits {counts.hit_ratio or 0:.1%}, KV mean "
                f"{counts.kv_use_mean or 0:.0%} max {counts.kv_use_max or 0:.0%}, {counts.preemptions} preempted, "
                f"{result.status.get('pruned_blocks')} blocks pruned, other processes {result.other_cpu_share:.0%}"
            )
            done.append((cell, result))
        return done

    def summarize(self, measured: Measured) -> dict[str, Any]:
        """Rows of the cells, and ratios of each setting to the baseline; those without windows are left out."""
        rows: list[dict[str, Any]] = []
        ratios: list[dict[str, Any]] = []
        for case in self.cases:
            baseline = results_of(measured, case, self.settings[0])
            for setting in self.settings:
                if not (results := results_of(measured, case, setting)):
                    continue
                columns = {**case.columns, **setting.columns}
                rows.append({**columns, **row_of(results)})
                if setting != self.settings[0] and baseline:
                    pairs = list(zip(results, baseline, strict=False))
                    found = {name: ratio_of(values_of(pairs, name)) for name in self.compared}
                    compared = {name: ratio and ratio.model_dump() for name, ratio in found.items()}
                    ratios.append({**columns, "attainment_gain": attainment_gain(pairs), **compared})
        return {"trace": self.trace.model_dump(mode="json"), "rows": rows, self.ratios: ratios}


def prefix_part(trace: Trace) -> Part:
    """Measure the gain of sharing prefixes at each overlap, and its cost where there is little to share."""
    cases = [
        Case(f"overlap {o:.0%}", {"overlap": o}, trace, system_tokens(trace, o), 2 if o == LOW_OVERLAP else 1)
        for o in OVERLAPS
    ]
    compared = (*_LATENCIES, "pairs_per_s", "forward_share", "overhead_share")
    return Part("prefix", trace, cases, SHARING, "on_over_off", compared)


def pruning_part(trace: Trace) -> Part:
    """Measure the gain of dropping KV blocks when memory is short, at each fraction."""
    compared = (*_LATENCIES, "pairs_per_s")
    return Part("pruning", trace, [Case("pressure", {}, trace)], PRUNING, "over_no_pruning", compared)


def ablation_part(trace: Trace) -> Part:
    """Take each mechanism away under a trace that is short of memory."""
    loads = {load: with_rate(trace, load * trace.arrivals.rate_per_s) for load in LOADS}
    cases = [Case(f"load {o:g}", {"load": o}, loaded, ABLATION_SYSTEM_TOKENS) for o, loaded in loads.items()]
    compared = ("slo_attainment", *_LATENCIES, "pairs_per_s")
    return Part("ablation", trace, cases, ABLATIONS, "over_full", compared)


async def measure_prefix(pool: EnginePool, options: MemoryOptions, journal: Journal) -> dict[str, Any]:
    """Measure all windows of this part; a report of built-in types."""
    trace = load_trace("prefix", options)
    if options.rate_per_s is None:
        alone = SHARING[0]
        job = alone.job(trace, pool.model_dir)

        async def calibrate() -> float:
            engine = await pool.get(alone.name, job.trace.args)
            probe_s = max(5.0, job.window_s / 2)
            return await calibrate_rate(engine, job.trace, pool.vocabulary, probe_s, options.busy_share)

        settings = [settings_of(job), options.busy_share]
        trace = with_rate(trace, await journal.once(f"rate/{trace.name}", settings, calibrate))
    note(f"prefix: {trace.arrivals.rate_per_s} requests/s")
    part = prefix_part(trace)
    measured = await part.measure(pool, options, journal)
    return {**part.summarize(measured), "checks": low_overlap_checks(part, measured)}


async def measure_pruning(pool: EnginePool, options: MemoryOptions, journal: Journal) -> dict[str, Any]:
    """Measure all windows of this part, and search for capacity; a report of built-in types."""
    trace = load_trace("pressure", options)
    part = pruning_part(trace)
    report = part.summarize(await part.measure(pool, options, journal))
    accuracy = None if options.pruning_report is None else PruningReport.load(options.pruning_report)
    for row, setting in zip(report["rows"], part.settings, strict=True):
        args = setting.job(trace, pool.model_dir).trace.args

        async def capacity(setting: Setting, context: int) -> dict[str, Any]:
            engine = await pool.get(setting.name, args)  # noqa: B023 - awaited before the next round
            return await measure_capacity(engine, context, setting.fraction, pool.vocabulary)

        key, settings = f"capacity/{setting.fraction:g}", args.model_dump(mode="json")
        row["capacity"] = [
            await journal.once(f"{key}/{context}", settings, partial(capacity, setting, context))
            for context in CONTEXTS
        ]
        note(f"{key}: {row['capacity']}")
        row.update(accuracy_columns(accuracy, setting.fraction))
    return report


async def measure_ablation(pool: EnginePool, options: MemoryOptions, journal: Journal) -> dict[str, Any]:
    """Measure all windows of this part; a report of built-in types."""
    part = ablation_part(load_trace("pressure", options))
    return part.summarize(await part.measure(pool, options, journal))


def row_of(results: Sequence[WindowResult]) -> dict[str, Any]:
    """Medians over repeats, and what is summed or pooled."""
    counts = [result.counts for result in results]
    queries = sum(count.prefix_queries for count in counts)
    row = summary_row([result.metrics for result in results])
    for total in ("num_requests", "num_errors"):
        row[total] = sum(getattr(result.metrics, total) for result in results)
    for total in ("pruned_blocks", "pruned_requests"):
        known = [result.status[total] for result in results if result.status.get(total) is not None]
        row[total] = sum(known) if known else None
    return {
        **row,
        "hit_ratio": sum(count.prefix_hits for count in counts) / queries if queries else None,
        "preemptions": sum(count.preemptions for count in counts),
        "kv_use_max": max((c.kv_use_max for c in counts if c.kv_use_max is not None), default=None),
        "kv_use_mean": mean(c.kv_use_mean for c in counts if c.kv_use_mean is not None),
        "other_cpu_share": mean(result.other_cpu_share for result in results),
        "all_blocks_free": all(result.all_blocks_free for result in results),
        "repeats": [result.model_dump(mode="json") for result in results],
    }


def results_of(measured: Measured, case: Case, setting: Setting) -> list[WindowResult]:
    """Windows of one cell, in order of the repeats."""
    names = (case.name, setting.name)
    return [result for cell, result in measured if (cell.case.name, cell.setting.name) == names]


def values_of(pairs: Pairs, name: str) -> list[tuple[float | None, float | None]]:
    """One metric of both windows."""
    return [(getattr(a.metrics, name), getattr(b.metrics, name)) for a, b in pairs]


def attainment_gain(pairs: Pairs) -> dict[str, Any] | None:
    """Points that the baseline (second) adds to the SLO attainment of a setting (first), with a 95 % interval."""
    known = values_of(pairs, "slo_attainment")
    gains = [full - without for without, full in known if full is not None and without is not None]
    if not gains:
        return None
    middle, low, high = center_of(gains)
    return {"middle": middle, "low": low, "high": high, "num_pairs": len(gains)}


def low_overlap_checks(part: Part, measured: Measured) -> list[dict[str, Any]]:
    """Check that no interval lies wholly on the worse side of 1 where there is little to share."""
    case = next(case for case in part.cases if case.columns["overlap"] == LOW_OVERLAP)
    off, on = (results_of(measured, case, setting) for setting in part.settings)
    checks = []
    for name in part.compared:
        ratio = ratio_of(values_of(list(zip(on, off, strict=False)), name), CHECK_CONFIDENCE)
        if ratio is None or ratio.low is None or ratio.high is None:
            continue
        is_worse = ratio.high < 1 if name == "pairs_per_s" else ratio.low > 1
        checks.append(
            {
                "check": f"{name}, sharing on / off at {LOW_OVERLAP:.0%} overlap, is not worse than 1",
                "value": ratio.ratio,
                "interval": [ratio.low, ratio.high],
                "confidence": CHECK_CONFIDENCE,
                "passed": not is_worse,
            }
        )
    return checks


def accuracy_columns(report: PruningReport | None, fraction: float) -> dict[str, Any]:
    """Accuracy from `mace profile pruning` on another model: the random weights here have nothing to get wrong."""
    if report is None:
        return {}
    columns = {"accuracy_model": report.origin.model}
    if fraction == 0:
        baseline = {kind: {"accuracy": task.accuracy} for kind, task in report.baseline.items()}
        return {**columns, "logprob_drop": None, "tasks": baseline}
    for row in report.fractions:
        if abs(row.fraction - fraction) < 1e-9:
            return {**columns, **row.model_dump(include={"logprob_drop", "tasks"})}
    return {}


def load_trace(name: str, options: MemoryOptions) -> Trace:
    """The trace `memory-<name>.yaml`, as long as the options say, and at their rate if they have one."""
    trace = Trace.load(TRACES / f"memory-{name}.yaml").model_copy(update={"duration_s": options.seconds})
    return trace if options.rate_per_s is None else with_rate(trace, options.rate_per_s)


def system_tokens(trace: Trace, overlap: float) -> int:
    """Length of a system prompt that makes up this share of all prompt tokens."""
    lengths = trace.prompt_tokens
    assert isinstance(lengths, Uniform)
    return round(overlap * (lengths.low + lengths.high) / 2)


def settings_of(job: Job) -> Any:
    """Everything that decides what a job measures."""
    return job.model_dump(mode="json", exclude={"model_dir"})
