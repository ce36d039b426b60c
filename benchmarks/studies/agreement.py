"""Does the simulator say what the engine does? `mace simulate agreement`.

Each trace runs through the open-loop client on a real engine, right after a profile was measured on that very engine.
Then the simulator runs the same trace from that profile. A machine that is shared with other work is not the same
machine an hour later, so neither a stored profile nor one from another process would be a fair start.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness.jobs import Job, run_job
from benchmarks.harness.models import model_directories
from benchmarks.harness.results import RunMetrics
from benchmarks.studies.simulate import run_trace
from simulator.trace import Trace

TOLERANCE = 0.15
"""Of the measured value."""

_FOLDER = Path(__file__).parents[1] / "traces"
TRACES = tuple(_FOLDER / f"agreement-{name}.yaml" for name in ("steady", "bursty", "long"))


def run_agreement(
    as_json: bool = False,
    traces: Sequence[Path] = TRACES,
    state_dir: Path = Path("state"),
    seconds: float | None = None,
) -> None:
    """Run the comparison and print it.

    Args:
        as_json: print JSON instead of a table.
        traces: files to compare on; they are for the built-in model.
        state_dir: where the built-in model is or will be.
        seconds: instead of the traces' own duration.

    Raises:
        ConfigError: a trace is wrong.
        MeasurementError: an engine failed.
    """
    loaded = [_shortened(Trace.load(path), seconds) for path in traces]
    with model_directories(["tiny"], state_dir, show_progress=not as_json) as directories:
        rows = [row for trace in loaded for row in compare(trace, directories["tiny"])]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _show(rows)


def compare(trace: Trace, model_dir: Path) -> list[dict[str, Any]]:
    """Rows of one trace, see `compare_numbers`. Takes an engine start, a profile and the trace's duration."""
    with tempfile.TemporaryDirectory(prefix="mace-agreement-") as directory:
        profile = Path(directory) / "profile.json"
        job = Job(
            model="tiny", model_dir=model_dir, trace=trace, window_s=trace.duration_s or 60.0, profile_out=profile
        )
        measured = run_job(job).served
        simulated = run_trace(trace, profile=profile, model_config=model_dir).to_json()
    return compare_numbers(trace.name, measured_numbers(measured), simulated_numbers(simulated))


def measured_numbers(metrics: RunMetrics) -> dict[str, float | None]:
    """What is compared, by name; of the engine."""
    return {
        "ttft_p50_s": metrics.ttft_p50_s,
        "ttft_p99_s": metrics.ttft_p99_s,
        "tbt_p50_s": metrics.tbt_p50_s,
        "tbt_p99_s": metrics.tbt_p99_s,
        "pairs_per_s": metrics.pairs_per_s,
    }


def simulated_numbers(result: dict[str, Any]) -> dict[str, float | None]:
    """The same of `simulator.statistics.Result.to_json()`."""
    latencies = {f"{name}_{q}_s": result[name][f"{q}_s"] for name in ("ttft", "tbt") for q in ("p50", "p99")}
    return {**latencies, "pairs_per_s": result["pairs_per_s"]}


def compare_numbers(
    trace: str, measured: dict[str, float | None], simulated: dict[str, float | None]
) -> list[dict[str, Any]]:
    """One row for each number: measured, simulated, their ratio, and whether it is within `TOLERANCE` of 1."""
    rows = []
    for name, real in measured.items():
        virtual = simulated[name]
        ratio = virtual / real if real and virtual is not None else None
        within = None if ratio is None else abs(ratio - 1) <= TOLERANCE
        rows.append(
            {
                "trace": trace,
                "metric": name,
                "measured": real,
                "simulated": virtual,
                "ratio": ratio,
                "within_15_percent": within,
            }
        )
    return rows


def _shortened(trace: Trace, seconds: float | None) -> Trace:
    return trace if seconds is None else trace.model_copy(update={"duration_s": seconds, "num_requests": None})


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("trace", "metric", "measured", "simulated", "ratio", "within 15 %")
    for row in rows:
        values = (row["measured"], row["simulated"], row["ratio"])
        verdict = {True: "yes", False: "no", None: "-"}[row["within_15_percent"]]
        table.add_row(row["trace"], row["metric"], *("-" if v is None else f"{v:.4g}" for v in values), verdict)
    Console().print(table)
