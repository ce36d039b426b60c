"""Does the simulator say what the engine does? `mace simulate agreement`.

Each trace runs through the open-loop client on a real engine, right after a profile was measured on that very engine.
Then the simulator runs the same trace from that profile. A machine that is shared with other work is not the same
machine an hour later, so neither a stored profile nor one from another process would be a fair start.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.jobs import TRACES, Job, run_job
from benchmarks.harness.models import model_directories
from benchmarks.harness.report import Column, show, table_of
from simulator.trace import Trace

TOLERANCE = 0.15
"""Share of the measured value by which the simulated one may differ."""
FILES = tuple(TRACES / f"agreement-{name}.yaml" for name in ("steady", "bursty", "long"))
"""They are for the built-in model."""

_COLUMNS: tuple[Column, ...] = (
    ("trace", "trace", str),
    ("metric", "metric", str),
    ("measured", "measured", "{:.4g}".format),
    ("simulated", "simulated", "{:.4g}".format),
    ("ratio", "ratio", "{:.4g}".format),
    ("within 15 %", "within_15_percent", lambda is_within: "yes" if is_within else "no"),
)


def run_agreement(as_json: bool = False, out: Path | None = None, files: Sequence[Path] = FILES) -> None:
    """Run the comparison on these traces and print it.

    Raises:
        ConfigError: a trace is wrong.
        MeasurementError: an engine failed.
    """
    traces = [Trace.load(path) for path in files]
    with model_directories(["tiny"], Path("state"), show_progress=not as_json) as directories:
        rows = [row for trace in traces for row in compare(trace, directories["tiny"])]
    show(rows, [table_of(None, rows, _COLUMNS)], as_json, out)


def compare(trace: Trace, model_dir: Path) -> list[dict[str, Any]]:
    """Rows of one trace, see `compare_numbers`. Takes an engine start, a profile and the trace's duration."""
    from benchmarks.studies.simulate import run_trace

    with tempfile.TemporaryDirectory(prefix="mace-agreement-") as directory:
        profile = Path(directory) / "profile.json"
        job = Job(
            model="tiny", model_dir=model_dir, trace=trace, window_s=trace.duration_s or 60.0, profile_out=profile
        )
        metrics = run_job(job).served
        simulated = run_trace(trace, profile=profile, model_config=model_dir).to_json()
    virtual = {f"{name}_{q}_s": simulated[name][f"{q}_s"] for name in ("ttft", "tbt") for q in ("p50", "p99")}
    virtual["pairs_per_s"] = simulated["pairs_per_s"]
    return compare_numbers(trace.name, {name: getattr(metrics, name) for name in virtual}, virtual)


def compare_numbers(
    trace: str, measured: dict[str, float | None], simulated: dict[str, float | None]
) -> list[dict[str, Any]]:
    """One row for each number: measured, simulated, their ratio, and whether it is within `TOLERANCE` of 1."""
    rows = []
    for name, real in measured.items():
        virtual = simulated[name]
        ratio = virtual / real if real and virtual is not None else None
        rows.append(
            {
                "trace": trace,
                "metric": name,
                "measured": real,
                "simulated": virtual,
                "ratio": ratio,
                "within_15_percent": None if ratio is None else abs(ratio - 1) <= TOLERANCE,
            }
        )
    return rows
