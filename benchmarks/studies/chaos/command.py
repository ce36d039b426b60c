"""`mace chaos`: kill processes of a server under load, and count what is lost."""

import asyncio
import json
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from openai import AsyncOpenAI
from rich.console import Console

from app.commands.processes import become_subreaper
from benchmarks.harness.server import ServerError, ServerProcess
from benchmarks.studies.chaos.ledger import preferences
from benchmarks.studies.chaos.load import ChatLoad, FeedbackLoad, export_all_pairs, read_all_feedback
from benchmarks.studies.chaos.plan import KINDS, Kind, Strike, make_plan
from benchmarks.studies.chaos.report import Findings, make_report, show_report
from benchmarks.studies.chaos.strike import Kill, Limits, Striker
from benchmarks.studies.chaos.watch import VersionWatch, Watch
from core.config import TINY_ASSISTANT

_DRAIN_S = 60.0


def chaos(
    kills: Annotated[int, typer.Option(min=1, help="How many processes to kill")] = 50,
    seed: Annotated[int, typer.Option(help="Of victims, moments and load")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr")] = False,
    kinds: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(KINDS)}")] = ",".join(KINDS),
    max_s: Annotated[float, typer.Option(min=1, help="Begin no further kill after this time, seconds")] = 7200.0,
    rate: Annotated[float, typer.Option(min=0.01, help="Chat requests per second")] = 2.0,
    feedback_interval_s: Annotated[float, typer.Option(min=0.01, help="Seconds between two feedback posts")] = 0.5,
    keep_state: Annotated[Path | None, typer.Option(help="New directory that state and log stay in")] = None,
    config: Annotated[Path, typer.Option(help="Serve config to start from")] = Path("serve_config.yaml"),
    state_dir: Annotated[Path, typer.Option(help="Where the built-in model is or will be")] = Path("state"),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of the server; none: a free one")] = None,
) -> None:
    """Kill processes of a server of our own at random, under load; exit code 1 if anything was lost."""
    from engine.tiny.build import ensure_tiny_assistant

    chosen = _parse_kinds(kinds)
    become_subreaper()
    ensure_tiny_assistant(state_dir, show_progress=not as_json)
    options = _Options(make_plan(kills, seed, chosen), seed, max_s, rate, feedback_interval_s)
    try:
        with _directories(keep_state) as (directory, ray_dir), _ended_by_sigterm():
            server = ServerProcess(
                directory,
                config,
                sections={"model": {"model_source": TINY_ASSISTANT}},
                models=state_dir / "models",
                ray_dir=ray_dir,
                port=port,
            )
            report = _run(server, options)
    except (ServerError, OSError) as error:
        typer.secho(f"mace chaos: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show_report(report, Console())
    raise typer.Exit(0 if report["passed"] else 1)


@dataclass(frozen=True, slots=True)
class _Options:
    plan: list[Strike]
    seed: int
    max_s: float
    rate_per_s: float
    feedback_interval_s: float


def _run(server: ServerProcess, options: _Options) -> dict[str, Any]:
    """Whatever happens, nothing of the server is left when this returns or raises."""
    started_s = time.monotonic()
    left_behind = -1
    try:
        findings = asyncio.run(_under_load(server, options))
        left_behind = server.end()
    finally:
        if left_behind < 0:
            with _undisturbed():
                server.end(None)
    findings["left_behind"] = left_behind
    findings["duration_s"] = time.monotonic() - started_s
    return make_report(Findings(**findings))


async def _under_load(server: ServerProcess, options: _Options) -> dict[str, Any]:
    """Start, load, kill, drain, read back."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with (
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=150.0) as openai,
        httpx.AsyncClient(base_url=server.url, limits=limits) as client,
    ):
        versions = VersionWatch(server.state_dir / "adapters")
        watch = Watch(client, server.state_dir, versions)
        chat = ChatLoad(openai, "mace-tiny", options.rate_per_s, random.Random(options.seed))
        feedback = FeedbackLoad(client, preferences(options.seed), options.feedback_interval_s)
        striker = Striker(server, watch, chat, feedback, Limits(), _note)
        _note("starting the server")
        await striker.start()
        background = [asyncio.create_task(work) for work in (watch.run(), chat.run())]
        feedback.start()
        try:
            stopped = await _strike(striker, options)
            background[1].cancel()
            await asyncio.gather(feedback.drain(_DRAIN_S), chat.drain(_DRAIN_S))
            audit = feedback.ledger.audit(await read_all_feedback(client), await export_all_pairs(client))
            await asyncio.to_thread(versions.look)
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, feedback.drain(0), chat.drain(0), return_exceptions=True)
    return {
        "seed": options.seed,
        "planned": len(options.plan),
        "stopped": stopped,
        "kills": striker.kills,
        "requests": chat.requests,
        "ledger": feedback.ledger,
        "audit": audit,
        "versions": versions,
        "restarts": striker.restarts,
    }


async def _strike(striker: Striker, options: _Options) -> str | None:
    """Carry out the plan. Returns why it was not carried out to its end, if something went wrong."""
    give_up_s = time.monotonic() + options.max_s
    await striker.wait_for_training()
    for strike in options.plan:
        if time.monotonic() > give_up_s:
            _note(f"{options.max_s:g} s are over; {len(options.plan) - len(striker.kills)} kills are left out")
            break
        try:
            kill = await striker.carry_out(strike)
        except (
            ServerError
        ) as error:  # what was found until now is worth a report; one more start, to read it all back
            _note(f"stopped: {error}")
            await striker.start_anew()
            return str(error)
        _note(_line(kill, len(options.plan)))
    return None


def _line(kill: Kill, total: int) -> str:
    times = {"recovered": kill.recovery_s, "training": kill.training_s}
    texts = ", ".join(f"{name} {'never' if s is None else f'after {s:.1f} s'}" for name, s in times.items())
    lost = "unknown" if kill.steps_lost is None else kill.steps_lost
    return f"{kill.number}/{total} {kill.kind} ({kill.target}) at {kill.moment}: {texts}; steps lost {lost}"


def _parse_kinds(text: str) -> list[Kind]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - set(KINDS))
    if unknown or not names:
        raise typer.BadParameter(f"kinds are {', '.join(KINDS)}; not {', '.join(unknown) or 'nothing'}")
    return [kind for kind in KINDS if kind in names]


@contextmanager
def _directories(keep: Path | None) -> Iterator[tuple[Path, Path]]:
    """For the server and for Ray, both new and, unless the first is kept, removed at the end.

    Raises:
        ServerError: the directory to keep is there already: it may be somebody's state.
    """
    with tempfile.TemporaryDirectory(prefix="mace-", ignore_cleanup_errors=True) as scratch:
        if keep is None:
            directory = Path(scratch) / "serve"
        elif keep.exists():
            raise ServerError(f"{keep} exists; --keep-state wants a new directory")
        else:
            directory = keep.absolute()
        directory.mkdir(parents=True)
        yield directory, Path(scratch)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM is as Ctrl-C here, so that the server is ended."""
    old = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not keep us from cleaning up."""
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _note(line: str) -> None:
    typer.echo(line, err=True)
