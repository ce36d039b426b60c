"""`mace simulate`: a trace on the production scheduler in virtual time, from a measured profile.

mace simulate benchmarks/traces/million.yaml --profile state/profiles/<device>/<model>.json
mace simulate agreement --json
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.table import Table

from benchmarks.harness.energy import joules_of
from benchmarks.harness.report import JOULES, Column, Out, digits, show, table_of
from benchmarks.studies.agreement import run_agreement
from core.config import AppArgs, Policy, SloConfig
from core.errors import ConfigError, MaceError
from core.model_dims import ModelDims
from profiler.profile import Profile
from simulator.cluster import Simulation
from simulator.executor import Options
from simulator.hardware import hardware_of
from simulator.plot import write_plot
from simulator.power import Power
from simulator.statistics import Result
from simulator.trace import Trace


def simulate(
    trace: Annotated[str, typer.Argument(help="A trace (YAML), or the word 'agreement'")],
    profile: Annotated[Path | None, typer.Option(help="Profile of the device; default: the trace's")] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="config.json of the profiled model; default: that of the trace's model")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; draw no picture unless asked to")] = False,
    plot: Annotated[Path | None, typer.Option(help="File of the picture; default: <trace>.png here")] = None,
    log: Annotated[Path | None, typer.Option(help="Write every event as a line of JSON")] = None,
    policy: Annotated[Policy | None, typer.Option(help="Instead of the trace's")] = None,
    power: Annotated[
        Path | None, typer.Option(help="Watts of CPU and GPU (YAML): compares what each policy takes")
    ] = None,
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
    out: Out = None,
) -> None:
    """Simulate a trace, or compare the simulator with the engine ('agreement')."""
    try:
        if trace == "agreement":
            run_agreement(as_json, out)
            return
        described = Trace.load(Path(trace))
        args = described.args
        watts = None if power is None else Power.load(power)
        given = {"seed": seed, "executors": executors, "args": _with_policy(args, policy), "power": watts}
        described = described.model_copy(update={key: value for key, value in given.items() if value is not None})
        options = Options(noise=noise, adapt=adapt, observe_every=adapt_every, router=router)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        run = partial(run_trace, profile=profile, model_config=model_config, options=options)
        result = run(described, log=log)
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
        if plot is None and not as_json:
            plot = Path(f"{described.name}.png")
        if plot is not None:
            write_plot(result, plot)
        report = {**result.to_json(), "wall_s": wall_s, "cpu_s": cpu_s}
        if described.power is not None and policy is None:
            report["policies"] = list(_compare(described, result, run))
        picture = [] if plot is None else [f"picture: {plot}"]
        show(report, [*_tables(report, described.args.slo), *picture], as_json, out)
    except MaceError as error:
        typer.echo(f"mace simulate: {error}", err=True)
        raise typer.Exit(1) from error


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
    measured = Profile.load(path)
    if model_config is None:
        from engine.model_source import resolve_model

        model_config = resolve_model(trace.args.model, trace.args.state_dir)
    dims = ModelDims.load(model_config, dtype_bytes=4 if trace.args.model.dtype == "float32" else 2)
    hardware = hardware_of(measured, dims, trace.args)
    try:
        events = contextlib.nullcontext() if log is None else log.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write event log {log}: {error}") from error
    with events as file:
        return Simulation(trace, hardware, options, write_log=None if file is None else file.write).run()


def _with_policy(args: AppArgs, policy: Policy | None) -> AppArgs:
    scheduler = args.scheduler.model_copy(update={"policy": policy or args.scheduler.policy})
    return args.model_copy(update={"scheduler": scheduler})


def _compare(trace: Trace, known: Result, run: Callable[[Trace], Result]) -> Iterator[dict[str, Any]]:
    """What each policy gives and takes on this trace, and the trace's own with AdamW on either device if that is known.

    `known` is the result of the trace's settings.
    """
    choices = [(policy, _with_policy(trace.args, policy)) for policy in get_args(Policy)]
    if known.can_move:
        for setting in ("never", "always"):
            offload = trace.args.offload.model_copy(update={"optimizer": setting})
            label = f"{trace.args.scheduler.policy}, offload {setting}"
            choices.append((label, trace.args.model_copy(update={"offload": offload})))
    for label, args in choices:
        result = known if args == trace.args else run(trace.model_copy(update={"args": args}))
        yield {
            "policy": label,
            "offload": result.placement.place,
            "slo_attainment": result.slo_attainment,
            "pairs_per_s": result.pairs_per_s,
            **(result.energy() or {}),
        }


def _tables(found: dict[str, Any], slo: SloConfig) -> Iterator[Table]:
    rows: list[dict[str, Any]] = [
        {"": "TTFT", **found["ttft"], "target_s": slo.ttft_s},
        {"": "TBT", **found["tbt"], "target_s": slo.tbt_s},
    ]
    if len(found["classes"]) > 1:
        classes = found["classes"].items()
        rows += [{"": f"TTFT {name}", **row["ttft"], "target_s": slo.ttft_s} for name, row in classes]
    columns = [
        (f"{name}, ms", f"{name}_s", lambda seconds: f"{1e3 * seconds:.1f}")
        for name in ("p50", "p90", "p99", "max", "target")
    ]
    yield table_of(found["trace"], rows, [("", "", str), *columns])
    table = Table("", "value", show_header=False)
    for name, value in _lines(found):
        table.add_row(name, value)
    yield table
    if policies := found.get("policies"):
        attained: Column = ("SLO attainment", "slo_attainment", lambda share: f"{share:.3%}")
        pairs: Column = ("pairs/s", "pairs_per_s", lambda rate: f"{rate:.3g}")
        yield table_of(
            "What the policies take",
            policies,
            [
                ("policy", "policy", str),
                ("AdamW on", "offload", str),
                attained,
                pairs,
                ("W", "mean_w", digits(1)),
                *JOULES,
            ],
        )


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    attained = found["slo_attainment"]
    classes = ", ".join(
        f"{row['requests']:,} {name} ({row['slo_attainment']:.2%})" for name, row in found["classes"].items()
    )
    energy = "not known: give --power" if found["energy"] is None else joules_of(found["energy"])
    shares = f"forward passes {found['forward_share']:.1%}, slices {found['slices_share']:.1%}"
    return [
        ("policy", found["policy"]),
        ("executors", f"{found['executors']:,}"),
        ("SLO attainment", "-" if attained is None else f"{attained:.3%}"),
        ("requests (attainment)", classes or "-"),
        ("fine-tune pairs/s", f"{found['pairs_per_s']:.3g} ({found['pairs']:,} pairs)"),
        ("utilisation", f"{found['utilisation']:.1%}: {shares}"),
        ("output tokens/s", f"{found['output_tokens_per_s']:,.0f}"),
        ("energy", energy),
        ("AdamW", f"on the {found['optimizer']['place']}: {found['optimizer']['reason']}"),
        ("iterations", f"{found['iterations']:,} with {found['slices']:,} slices"),
        ("preemptions", f"{found['preemptions']:,}"),
        (
            "time",
            f"{found['virtual_s']:,.1f} s virtual in {found['wall_s']:.1f} s ({found['cpu_s']:.1f} s of CPU)",
        ),
    ]
