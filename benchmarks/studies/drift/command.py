"""`mace demo drift`."""

import json
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.studies.drift.policies import Policy
from core.errors import MaceError


def drift(
    out: Annotated[Path, typer.Option(help="Directory for drift.csv, drift.png, summary.json and runs/")],
    policies: Annotated[str, typer.Option(help="Which, with commas between")] = ",".join(Policy),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each policy, with seeds 0, 1, ...")] = 3,
    phase_s: Annotated[float, typer.Option("--phase-s", min=1, help="Seconds that a style is preferred")] = 40.0,
    pairs_per_phase: Annotated[int, typer.Option(min=1, help="Pairs posted in that time")] = 140,
    requests_per_s: Annotated[float, typer.Option("--requests-per-s", help="Chat requests beside them")] = 3.0,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs that are in the directory")] = False,
    config: Annotated[Path, typer.Option(help="Serve config to start from")] = Path("serve_config.yaml"),
    state_dir: Annotated[Path, typer.Option(help="Where the built-in model is or will be")] = Path("state"),
    port: Annotated[int | None, typer.Option(help="Of the servers; none: a free one")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON")] = False,
) -> None:
    """Let users change their mind twice, under every policy, each on a fresh server; draw how well it is followed."""
    from app.commands.processes import become_subreaper
    from benchmarks.studies.drift.plan import DriftPlan
    from benchmarks.studies.drift.report import show, write_report
    from benchmarks.studies.drift.run import run_all
    from engine.tiny.build import ensure_tiny_assistant

    try:
        chosen = [Policy(name.strip()) for name in policies.split(",")]
        plan = DriftPlan(phase_s=phase_s, pairs_per_phase=pairs_per_phase, requests_per_s=requests_per_s)
    except ValueError as error:
        typer.secho(f"mace demo drift: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
    become_subreaper()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server of the run is ended first
    try:
        records = run_all(
            plan,
            chosen,
            list(range(seeds)),
            out=out,
            config=config,
            model_dir=ensure_tiny_assistant(state_dir, show_progress=not as_json).absolute(),
            port=port,
            resume=resume,
            say=lambda line: typer.echo(line, err=True),
        )
        summary = write_report(records, out)
    except MaceError as error:
        typer.secho(f"mace demo drift: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        show(summary, Console())
