"""Do requests keep their SLOs while training uses the rest of the device? `mace bench slo`.

For each model: calibrate the request rate once, then in every repeat run training alone and each policy, one fresh
engine a run, all with the same settings, trace and backlog. Repeats interleave the policies, so that drift of a
noisy machine falls on all. The policies that block are asked to train `BASELINE_GOAL` of what the idle share of
the device allows, which is what `mace` has to reach, so that attainment is compared at equal training.
"""

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from benchmarks.harness.energy import EnergyWatch
from benchmarks.harness.jobs import TRACES, VERSIONED, Job, JobResult, run_job, with_rate, with_section
from benchmarks.harness.models import TITLES, ModelName, model_directories
from benchmarks.harness.report import (
    JOULES,
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
"""Least attainment of `mace`, where `inference_only` reaches `MIN_BASELINE_ATTAINMENT`."""
MIN_BASELINE_ATTAINMENT = 0.995
BASELINE_GOAL = 0.85
"""Share of (training alone x idle share): what `mace` has to train, and what the blocking policies are asked for."""

ALONE_EXPERIMENTS = {"packing": "first_fit"}
"""Training alone takes slices as large as the settings allow: nobody is delayed by them, and they are the faster ones.
The ideal would be too easy to reach otherwise."""

_LEAST_PROBE_S = 5.0


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
    names: list[ModelName] = ["tiny", "half-b"] if model == "both" else [model]
    reports = []
    with model_directories(names, state_dir, show_progress=not as_json) as directories:
        for name in names:
            trace = load_trace(name, seconds, rate, {"ttft_s": ttft, "tbt_s": tbt}, threads, profile)
            reports.append(
                measure_model(name, directories[name], trace, repeats, busy if rate is None else None, run_job)
            )
    show(reports, (table for report in reports for table in _tables(report)), as_json, out)


def _tables(report: dict[str, Any]) -> Iterator[Table]:
    shares = (("of ideal", "pairs_of_ideal", digits(2)), ("forward", "forward_share", percent))
    columns: list[Column] = [
        ("policy", "policy", str),
        *SERVED,
        *shares,
        ("slices", "slices_share", percent),
        *JOULES,
    ]
    yield table_of(report["model"], report["rows"], columns)
    yield checks_table(report["model"], report["checks"])


def load_trace(
    name: ModelName,
    seconds: float,
    rate_per_s: float | None = None,
    slo: dict[str, float | None] | None = None,
    num_threads: int = 0,
    profile: Path | None = None,
) -> Trace:
    """The trace `slo-<name>.yaml`, as long as that; a rate and targets of None are the trace's own."""
    trace = Trace.load(TRACES / f"slo-{name}.yaml").model_copy(update={"duration_s": seconds})
    targets = {key: value for key, value in (slo or {}).items() if value is not None}
    trace = with_section(with_section(trace, "slo", **targets), "engine", num_threads=num_threads)
    trace = with_section(trace, "profile", path=profile)
    return trace if rate_per_s is None else with_rate(trace, rate_per_s)


def measure_model(
    name: ModelName, model_dir: Path, trace: Trace, repeats: int, busy_share: float | None, run: Runner
) -> dict[str, Any]:
    """Run everything on one model; a report of built-in types.

    What is not known is measured first, on one engine: a profile, if the trace names none, and the request rate at
    which forward passes take `busy_share` of the time; None: the trace's own rate.
    """
    with tempfile.TemporaryDirectory(prefix="mace-slo-") as scratch:
        profile = Path(scratch) / "profile.json" if trace.args.profile.path is None else None
        if profile is not None or busy_share is not None:
            job = Job(
                model=name,
                model_dir=model_dir,
                trace=trace,
                kind="profile" if busy_share is None else "calibrate",
                window_s=max(_LEAST_PROBE_S, (trace.duration_s or 0.0) / 4),
                busy_share=busy_share or 0.5,
                profile_out=profile,
            )
            if (found := run(job)).rate_per_s is not None:
                trace = with_rate(trace, found.rate_per_s)
        if profile is not None:
            trace = with_section(trace, "profile", path=profile)
        note(f"{TITLES[name]}: {trace.arrivals.rate_per_s} requests/s")
        runs: dict[str, list[RunMetrics]] = {ALONE: [], **{policy: [] for policy in POLICIES}}
        for repeat in range(repeats):
            for label, results in runs.items():
                result = run(_job(name, model_dir, trace, label, _goal_pairs_per_s(runs)))
                results.append(result.served)
                note(f"{TITLES[name]}, repeat {repeat + 1}, {label}: {progress_line(result.served)}")
    settings = {
        "trace": trace.model_dump(mode="json", exclude={"args"}),
        "slo": trace.args.slo.model_dump(),
        "engine": trace.args.engine.model_dump(mode="json"),
        "training": trace.args.training.model_dump(mode="json"),
        "profile": "measured before" if profile is not None else str(trace.args.profile.path),
        "worker_cores": result.threads,
        "energy": EnergyWatch().told(),
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
    """Take the goal from the first repeat, so that all repeats of a policy have one setting."""
    ideal = _ideal_pairs_per_s({label: results[:1] for label, results in runs.items()})
    return None if ideal is None else BASELINE_GOAL * ideal


def _job(name: ModelName, model_dir: Path, trace: Trace, label: str, goal_pairs_per_s: float | None) -> Job:
    """Nothing but the policy differs, and for those that block the pairs for each request."""
    experiments: dict[str, Any] = ALONE_EXPERIMENTS if label == ALONE else {}
    if label in ("periodic", "continuous") and goal_pairs_per_s:
        experiments = {"retrain_rate": goal_pairs_per_s / trace.arrivals.rate_per_s}
    trace = with_section(trace, "scheduler", policy="mace" if label == ALONE else label)
    return Job(
        model=name,
        model_dir=model_dir,
        trace=with_section(trace, "experiments", **experiments),
        with_requests=label != ALONE,
        with_training=label != "inference_only",
        window_s=trace.duration_s or 0.0,
    )


def _checks(rows: dict[str, dict[str, Any]], slo: SloConfig) -> list[dict[str, Any]]:
    mace, baseline = rows.get("mace"), rows.get("inference_only")
    if mace is None or baseline is None:
        return []
    is_reachable = (baseline["pooled_slo_attainment"] or 0.0) >= MIN_BASELINE_ATTAINMENT
    attained = f"SLO attainment of mace, where inference_only reaches {MIN_BASELINE_ATTAINMENT}"
    trained = "pairs/s of mace / (training alone x idle share)"
    checks: list[dict[str, Any]] = [
        {"check": attained, "value": mace["pooled_slo_attainment"], "at_least": MIN_ATTAINMENT},
        {"check": trained, "value": mace["pairs_of_ideal"], "at_least": BASELINE_GOAL},
        {"check": "TBT p99 of mace in seconds", "value": mace["tbt_p99_s"], "at_most": slo.tbt_s},
    ]
    for check in checks:
        value, low, high = check["value"], check.get("at_least", 0.0), check.get("at_most", math.inf)
        is_told = value is not None and (is_reachable or check["check"] != attained)
        check["passed"] = low <= value <= high if is_told else None
    return checks
