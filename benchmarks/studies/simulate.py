"""`mace simulate`: a trace on the production scheduler in virtual time, from a measured profile.

mace simulate benchmarks/traces/million.yaml --profile state/profiles/<device>/<model>.json
mace simulate agreement --json
"""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from core.errors import ConfigError, MaceError
from core.model_dims import ModelDims
from profiler.profile import Profile
from simulator.cluster import Options, Simulation
from simulator.hardware import hardware_of
from simulator.plot import write_plot
from simulator.statistics import Result
from simulator.trace import Trace

_AGREEMENT = "agreement"

Policy = Literal["mace", "inference_only", "periodic", "continuous"]


def simulate(
    trace: Annotated[str, typer.Argument(help="A trace (YAML), or the word 'agreement'")],
    profile: Annotated[Path | None, typer.Option(help="Profile of the device; default: the trace's")] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="config.json of the profiled model; default: that of the trace's model")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, and draw no picture unless asked to")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Where the picture goes; default: <trace>.png here")] = None,
    log: Annotated[Path | None, typer.Option(help="Write every event as a line of JSON")] = None,
    policy: Annotated[Policy | None, typer.Option(help="Instead of the trace's")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the trace's")] = None,
    executors: Annotated[int | None, typer.Option(min=1, max=1000, help="Instead of the trace's")] = None,
    noise: Annotated[bool, typer.Option(help="Draw latencies from the profile's noise")] = True,
    adapt: Annotated[bool, typer.Option(help="Planners learn from the simulated iterations")] = True,
    adapt_every: Annotated[
        int | None, typer.Option(min=1, help="They learn from every n-th one; default 1, in large runs 8")
    ] = None,
    router: Annotated[
        Literal["auto", "placement", "least_loaded"], typer.Option(help="auto: placement up to 8 executors")
    ] = "auto",
) -> None:
    """Simulate a trace, or compare the simulator with the engine ('agreement')."""
    try:
        if trace == _AGREEMENT:
            _agreement(as_json)
            return
        described = _override(Trace.load(Path(trace)), policy=policy, seed=seed, executors=executors)
        options = Options(noise=noise, adapt=adapt, observe_every=adapt_every, router=router)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        result = run_trace(described, profile=profile, model_config=model_config, options=options, log=log)
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
        if plot is None and not as_json:
            plot = Path(f"{described.name}.png")
        if plot is not None:
            write_plot(result, described.args.slo, plot)
    except MaceError as error:
        typer.echo(f"mace simulate: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps({**result.to_json(), "wall_s": wall_s, "cpu_s": cpu_s}, indent=2))
        return
    _show(result.to_json(), described, wall_s, cpu_s)
    typer.echo(f"picture: {plot}")


def run_trace(
    trace: Trace,
    *,
    profile: Path | None = None,
    model_config: Path | None = None,
    options: Options | None = None,
    log: Path | None = None,
) -> Result:
    """Simulate a trace on a profile from a file; what is None comes from the trace.

    Raises:
        ConfigError: no profile is named, or settings are missing.
        ProfileError: the profile cannot be read.
    """
    path = profile or trace.profile or trace.args.profile.path
    if path is None:
        raise ConfigError("no profile: measure one (mace profile measure), then give it with --profile")
    hardware = hardware_of(Profile.load(path), _model_dims(trace, model_config), trace.args)
    with ExitStack() as stack:
        write = None
        if log is not None:
            try:
                write = stack.enter_context(log.open("w", encoding="utf-8")).write
            except OSError as error:
                raise ConfigError(f"cannot write event log {log}: {error}") from error
        return Simulation(trace, hardware, options, write_log=write).run()


def _model_dims(trace: Trace, model_config: Path | None) -> ModelDims:
    if model_config is None:
        from engine.model_source import resolve_model

        model_config = resolve_model(trace.args.model, trace.args.state_dir)
    return ModelDims.load(model_config, dtype_bytes=4 if trace.args.model.dtype == "float32" else 2)


def _override(trace: Trace, *, policy: Policy | None, seed: int | None, executors: int | None) -> Trace:
    changes: dict[str, Any] = {}
    if policy is not None:
        scheduler = trace.args.scheduler.model_copy(update={"policy": policy})
        changes["args"] = trace.args.model_copy(update={"scheduler": scheduler})
    if seed is not None:
        changes["seed"] = seed
    if executors is not None:
        changes["executors"] = executors
    return trace.model_copy(update=changes)


def _agreement(as_json: bool) -> None:
    from benchmarks.studies.agreement import run_agreement

    run_agreement(as_json=as_json)


def _show(found: dict[str, Any], trace: Trace, wall_s: float, cpu_s: float) -> None:
    console = Console()
    slo = trace.args.slo
    latencies = Table("", "p50, ms", "p90, ms", "p99, ms", "max, ms", "target, ms", title=found["trace"])
    rows = [("TTFT", found["ttft"], slo.ttft_s), ("TBT", found["tbt"], slo.tbt_s)]
    if len(found["classes"]) > 1:
        rows += [(f"TTFT {name}", row["ttft"], slo.ttft_s) for name, row in found["classes"].items()]
    for name, row, target_s in rows:
        values = [row[key] for key in ("p50_s", "p90_s", "p99_s", "max_s")]
        cells = ("-" if value_s is None else f"{1000 * value_s:.1f}" for value_s in values)
        latencies.add_row(name, *cells, f"{1000 * target_s:g}")
    console.print(latencies)
    table = Table("", "value", show_header=False)
    for name, value in _lines(found, wall_s, cpu_s):
        table.add_row(name, value)
    console.print(table)


def _lines(found: dict[str, Any], wall_s: float, cpu_s: float) -> list[tuple[str, str]]:
    attained = found["slo_attainment"]
    classes = ", ".join(
        f"{row['requests']:,} {name} ({row['slo_attainment']:.2%})" for name, row in found["classes"].items()
    )
    shares = f"forward passes {found['forward_share']:.1%}, slices {found['slices_share']:.1%}"
    return [
        ("policy", found["policy"]),
        ("executors", f"{found['executors']:,}"),
        ("SLO attainment", "-" if attained is None else f"{attained:.3%}"),
        ("requests (attainment)", classes or "-"),
        ("fine-tune pairs/s", f"{found['pairs_per_s']:.3g} ({found['pairs']:,} pairs)"),
        ("utilisation", f"{found['utilisation']:.1%}: {shares}"),
        ("output tokens/s", f"{found['output_tokens_per_s']:,.0f}"),
        ("iterations", f"{found['iterations']:,} with {found['slices']:,} slices"),
        ("preemptions", f"{found['preemptions']:,}"),
        ("time", f"{found['virtual_s']:,.1f} s virtual in {wall_s:.1f} s ({cpu_s:.1f} s of CPU)"),
    ]
