"""`mace profile`: measure this device, fit the latency and memory models, look at the fits."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from app.commands.profile_pruning import pruning
from app.commands.profile_settings import CONFIG_OPTION, JSON_OPTION, clear_errors, read_args
from core.config import AppArgs
from profiler.fit import fit_profile, fit_raw
from profiler.measure import Measurement, measure_grid
from profiler.profile import FitError, Profile

app = typer.Typer(no_args_is_help=True, help="Measure this device, fit the latency and memory models, draw them.")
app.command()(pruning)

_PROGRESS_POINTS = 20


@app.command()
def measure(
    config: CONFIG_OPTION = Path("serve_config.yaml"),
    model: Annotated[str | None, typer.Option(help="Model source instead of the config's")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="State directory instead of the config's")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default is where `mace serve` looks")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Measuring time after the engine started")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of prompts and of the hold-out split")] = 0,
    as_json: JSON_OPTION = False,
) -> None:
    """Start the engine, measure a grid of batches and slices, fit, and write a profile."""
    with clear_errors():
        args = read_args(config, model, state_dir)
        profile, path = asyncio.run(_measure(args, out, seconds, seed, show_progress=not as_json))
        profile.save(path)
    _show(profile, path, as_json)


@app.command()
def fit(
    path: Annotated[Path, typer.Argument(help="Profile JSON")],
    out: Annotated[Path | None, typer.Option(help="Write the new profile here; default: write nothing")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the hold-out split; default: the profile's")] = None,
    as_json: JSON_OPTION = False,
) -> None:
    """Fit again from the raw samples of a profile and print the hold-out errors."""
    with clear_errors():
        old = Profile.load(path)
        origin = old.origin if seed is None else old.origin.model_copy(update={"seed": seed})
        profile = fit_raw(old.samples, origin, kv_bytes_per_token=old.memory.kv_bytes_per_token)
        if out is not None:
            profile.save(out)
    _show(profile, out or path, as_json)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="Profile JSON")],
    out: Annotated[Path | None, typer.Option(help="PNG to write; default: beside the profile")] = None,
) -> None:
    """Draw measured against fitted latencies as PNG."""
    from profiler.report import draw_report

    with clear_errors():
        target = out or path.with_suffix(".png")
        draw_report(Profile.load(path), target)
    typer.echo(str(target))


async def _measure(
    args: AppArgs, out: Path | None, seconds: float, seed: int, *, show_progress: bool
) -> tuple[Profile, Path]:
    from deployments.monitors.profiling import measure_plan, origin_of, with_profile_path
    from engine.model_source import resolve_model
    from engine.vllm.compat import configure_environment
    from engine.vllm.engine import HybridEngine

    model_dir = resolve_model(args.model, args.state_dir, show_progress=show_progress)
    configure_environment(args, model_dir)
    args = with_profile_path(args, model_dir)
    origin = origin_of(args, seed=seed)
    engine = await HybridEngine.start(args, str(model_dir))
    try:
        plan = measure_plan(engine, args, budget_s=seconds, seed=seed)
        kv_bytes_per_token = engine.kv_bytes_per_token
        measurement = await measure_grid(engine, plan, _print_progress if show_progress else None)
    finally:
        engine.shutdown()
    profile = fit_profile(
        measurement.samples,
        origin,
        memory=measurement.memory,
        kv_bytes_per_token=kv_bytes_per_token,
    )
    path = out or args.profile.path
    assert path is not None  # with_profile_path
    return profile, path


def _print_progress(measurement: Measurement) -> None:
    if measurement.num_points % _PROGRESS_POINTS:
        return
    typer.echo(
        f"{measurement.num_points} points, {len(measurement.samples)} iterations, {measurement.measured_s:.0f} s",
        err=True,
    )


def _show(profile: Profile, path: Path, as_json: bool) -> None:
    if as_json:
        summary = profile.model_dump(mode="json", exclude={"samples"})
        typer.echo(json.dumps({"path": str(path), **summary}, indent=2))
        return
    table = Table(title=f"{profile.origin.model} on {profile.origin.device}")
    for column in ("what", "rows", "held out", "median error", "p95 error"):
        table.add_column(column)
    _add_row(table, "forward pass", len(profile.samples.forward), profile.forward_error)
    for kind, error in sorted(profile.slice_errors.items()):
        _add_row(table, kind.value, len(profile.samples.slices.get(kind, ())), error)
    Console().print(table)
    typer.echo(f"overhead {1e3 * profile.overhead_s:.2f} ms an iteration; profile: {path}")


def _add_row(table: Table, name: str, num_rows: int, error: FitError) -> None:
    table.add_row(name, str(num_rows), str(error.num_rows), f"{error.median:.1%}", f"{error.p95:.1%}")
