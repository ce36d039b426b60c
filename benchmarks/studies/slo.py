"""Do requests keep their SLOs while training uses the rest of the device? `mace bench slo`.

For each model: calibrate the request rate once, then in every repeat run training alone and each policy, one fresh
engine a run, all with the same settings, trace and backlog. Repeats interleave the policies, so that drift of a
noisy machine falls on all. The policies that block are asked to train `BASELINE_GOAL` of what the idle share of
the device allows, which is what `mace` has to reach, so that attainment is compared at equal training.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from benchmarks.harness.jobs import TRACES, VERSIONED, Job, JobResult, run_job, with_rate
from benchmarks.harness.models import TITLES, ModelName, model_directories
from benchmarks.harness.report import (
    SERVED,
    AsJson,
    Column,
    Out,
    StateDir,
    checks_table,
    digits,
    note,
    percent,
    show,
    table_of,
)
from benchmarks.harness.results import RunMetrics, progress_line, summary_row
from core.config import SloConfig
from profiler.device import installed_versions
from simulator.trace import Trace

ALONE = "training_alone"
POLICIES = ("inference_only", "mace", "periodic", "continuous")

MIN_ATTAINMENT = 0.99
"""Of `mace`, where `inference_only` reaches `MIN_BASELINE_ATTAINMENT`."""
MIN_BASELINE_ATTAINMENT = 0.995
BASELINE_GOAL = 0.85
"""Of (training alone x idle share): what `mace` has to train, and what the blocking policies are asked for."""

ALONE_SCHEDULER = {"policy": "mace", "packing": "first_fit"}
"""Training alone takes slices as large as the settings allow: nobody is delayed by them, and they are the faster ones.
The ideal would be too easy to reach otherwise."""

_LEAST_PROBE_S = 5.0


class SloOptions(BaseModel):
    """What the command line can choose. None: from the trace, or calibrated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    repeats: int
    rate_per_s: float | None = None
    ttft_s: float | None = None
    tbt_s: float | None = None
    num_threads: int = 0
    profile: Path | None = None
    busy_share: float = 0.4


Runner = Callable[[Job], JobResult]
"""`benchmarks.harness.jobs.run_job`."""


def main(
    as_json: AsJson = False,
    model: Annotated[Literal["tiny", "half-b", "both"], typer.Option(help="Which model")] = "both",
    seconds: Annotated[float, typer.Option(min=2, help="Length of each measuring window")] = 40.0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each policy, interleaved")] = 3,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests/s; none: calibrated")] = None,
    busy: Annotated[float, typer.Option(min=0.01, max=0.95, help="Busy share that calibration aims at")] = 0.4,
    ttft: Annotated[float | None, typer.Option(min=0.001, help="TTFT target in seconds")] = None,
    tbt: Annotated[float | None, typer.Option(min=0.001, help="TBT target in seconds")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Worker threads; 0: the engine's rule")] = 0,
    profile: Annotated[Path | None, typer.Option(help="Profile to start from; none: measured first")] = None,
    state_dir: StateDir = Path("state"),
    out: Out = None,
) -> None:
    """SLO attainment and training throughput of every policy on the CPU engine."""
    options = SloOptions(
        seconds=seconds,
        repeats=repeats,
        rate_per_s=rate,
        ttft_s=ttft,
        tbt_s=tbt,
        num_threads=threads,
        profile=profile,
        busy_share=busy,
    )
    names: list[ModelName] = ["tiny", "half-b"] if model == "both" else [model]
    with model_directories(names, state_dir, show_progress=not as_json) as directories:
        reports = [measure_model(name, directories[name], options, run_job) for name in names]
    show(reports, (table for report in reports for table in _tables(report)), as_json, out)


def _tables(report: dict[str, Any]) -> Iterator[Table]:
    shares = (("of ideal", "pairs_of_ideal", digits(2)), ("forward", "forward_share", percent))
    columns: list[Column] = [("policy", "policy", str), *SERVED, *shares, ("slices", "slices_share", percent)]
    yield table_of(report["model"], report["rows"], columns)
    yield checks_table(report["model"], report["checks"])


def measure_model(name: ModelName, model_dir: Path, options: SloOptions, run: Runner) -> dict[str, Any]:
    """Run everything on one model; a report of built-in types. The trace is `traces/slo-<name>.yaml`.

    What the options leave open is measured first, on one engine: the rate, and the profile.
    """
    with tempfile.TemporaryDirectory(prefix="mace-slo-") as scratch:
        trace = _trace(name, options)
        kind: Literal["calibrate", "profile"] = "calibrate" if options.rate_per_s is None else "profile"
        profile_out = Path(scratch) / "profile.json" if options.profile is None else None
        if kind == "calibrate" or profile_out is not None:
            found = run(
                Job(
                    model=name,
                    model_dir=model_dir,
                    trace=trace,
                    kind=kind,
                    window_s=max(_LEAST_PROBE_S, options.seconds / 4),
                    busy_share=options.busy_share,
                    profile_out=profile_out,
                )
            )
            trace = with_rate(trace, found.calibrated_rate_per_s) if kind == "calibrate" else trace
        if profile_out is not None:
            trace = _with_section(trace, "profile", path=profile_out)
        return _measure_all(name, model_dir, trace, options, run)


def _measure_all(
    name: ModelName, model_dir: Path, trace: Trace, options: SloOptions, run: Runner
) -> dict[str, Any]:
    threads = "unknown"
    note(f"{TITLES[name]}: {trace.arrivals.rate_per_s} requests/s")
    runs: dict[str, list[RunMetrics]] = {ALONE: [], **{policy: [] for policy in POLICIES}}
    for repeat in range(options.repeats):
        for label, results in runs.items():
            result = run(_job(name, model_dir, trace, label, options.seconds, _goal_pairs_per_s(runs)))
            results.append(result.served)
            threads = result.threads
            note(f"{TITLES[name]}, repeat {repeat + 1}, {label}: {progress_line(result.served)}")
    settings = {
        "trace": trace.model_dump(mode="json", exclude={"args"}),
        "slo": trace.args.slo.model_dump(),
        "engine": trace.args.engine.model_dump(mode="json"),
        "training": trace.args.training.model_dump(mode="json"),
        "profile": "measured before" if options.profile is None else str(options.profile),
        "worker_cores": threads,
        "cores": len(os.sched_getaffinity(0)),
        "versions": installed_versions(VERSIONED),
        "baseline_goal_pairs_per_s": _goal_pairs_per_s(runs),
    }
    return {"model": TITLES[name], "settings": settings, **summarize_runs(runs, trace.args.slo)}


def summarize_runs(runs: dict[str, list[RunMetrics]], slo: SloConfig) -> dict[str, Any]:
    """Rows of medians, what the ideal is, and whether the targets are met."""
    ideal = _ideal_pairs_per_s(runs)
    rows = {}
    for label, results in runs.items():
        if results:
            row = rows[label] = {"policy": label, **summary_row(results)}
            row["pairs_of_ideal"] = row["pairs_per_s"] / ideal if ideal else None
            row["repeats"] = [result.model_dump() for result in results]
    return {"ideal_pairs_per_s": ideal, "rows": list(rows.values()), "checks": _checks(rows, slo)}


def _ideal_pairs_per_s(runs: dict[str, list[RunMetrics]]) -> float | None:
    """Training alone x idle share of the device under `inference_only`; medians over repeats."""
    if not runs[ALONE] or not runs["inference_only"]:
        return None
    alone = statistics.median(result.pairs_per_s for result in runs[ALONE])
    return alone * statistics.median(result.idle_share for result in runs["inference_only"])


def _goal_pairs_per_s(runs: dict[str, list[RunMetrics]]) -> float | None:
    """From the first repeat, so that all repeats of a policy have one setting."""
    ideal = _ideal_pairs_per_s({label: results[:1] for label, results in runs.items()})
    return None if ideal is None else BASELINE_GOAL * ideal


def _trace(name: ModelName, options: SloOptions) -> Trace:
    trace = Trace.load(TRACES / f"slo-{name}.yaml").model_copy(update={"duration_s": options.seconds})
    slo = trace.args.slo
    trace = _with_section(trace, "slo", ttft_s=options.ttft_s or slo.ttft_s, tbt_s=options.tbt_s or slo.tbt_s)
    trace = _with_section(trace, "engine", num_threads=options.num_threads)
    trace = _with_section(trace, "profile", path=options.profile)
    return trace if options.rate_per_s is None else with_rate(trace, options.rate_per_s)


def _with_section(trace: Trace, name: str, **values: Any) -> Trace:
    """The trace with these values in a section of its settings."""
    section = getattr(trace.args, name).model_copy(update=values)
    return trace.model_copy(update={"args": trace.args.model_copy(update={name: section})})


def _job(
    name: ModelName, model_dir: Path, trace: Trace, label: str, seconds: float, goal_pairs_per_s: float | None
) -> Job:
    """Nothing but the policy differs, and for those that block the pairs for each request."""
    scheduler: dict[str, Any] = ALONE_SCHEDULER if label == ALONE else {"policy": label}
    if label in ("periodic", "continuous") and goal_pairs_per_s:
        scheduler["retrain_rate"] = goal_pairs_per_s / trace.arrivals.rate_per_s
    return Job(
        model=name,
        model_dir=model_dir,
        trace=_with_section(trace, "scheduler", **scheduler),
        with_requests=label != ALONE,
        with_training=label != "inference_only",
        window_s=seconds,
    )


def _checks(rows: dict[str, dict[str, Any]], slo: SloConfig) -> list[dict[str, Any]]:
    mace, baseline = rows.get("mace"), rows.get("inference_only")
    if mace is None or baseline is None:
        return []
    reachable = (baseline["pooled_slo_attainment"] or 0.0) >= MIN_BASELINE_ATTAINMENT
    share, tbt_p99_s = mace["pairs_of_ideal"], mace["tbt_p99_s"]
    return [
        {
            "check": f"SLO attainment of mace, where inference_only reaches {MIN_BASELINE_ATTAINMENT}",
            "value": mace["pooled_slo_attainment"],
            "at_least": MIN_ATTAINMENT,
            "passed": mace["pooled_slo_attainment"] >= MIN_ATTAINMENT if reachable else None,
        },
        {
            "check": "pairs/s of mace / (training alone x idle share)",
            "value": share,
            "at_least": BASELINE_GOAL,
            "passed": None if share is None else share >= BASELINE_GOAL,
        },
        {
            "check": "TBT p99 of mace in seconds",
            "value": tbt_p99_s,
            "at_most": slo.tbt_s,
            "passed": None if tbt_p99_s is None else tbt_p99_s <= slo.tbt_s,
        },
    ]
