"""`mace chaos`: kill processes of a server under load, and count what is lost."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer
from openai import AsyncOpenAI

from benchmarks.harness.client import HttpPort, Load
from benchmarks.harness.report import AsJson, StateDir, note, show
from benchmarks.harness.server import ServerError, ServerProcess, own_servers
from benchmarks.studies.chaos.load import (
    FeedbackPort,
    Ledger,
    export_all_pairs,
    preferences,
    questions,
    read_all_feedback,
    write_feedback,
)
from benchmarks.studies.chaos.report import Findings, make_report, tables
from benchmarks.studies.chaos.strike import KINDS, Kill, Strike, Striker, make_plan
from benchmarks.studies.chaos.watch import Watch
from core.config import TINY_ASSISTANT

_DRAIN_S = 60.0
_CHAT_TIMEOUT_S = 150.0


def chaos(
    kills: Annotated[int, typer.Option(min=1, help="Number of processes to kill")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of victims, moments and load")] = 0,
    as_json: AsJson = False,
    kinds: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(KINDS)}")] = ",".join(KINDS),
    max_s: Annotated[float, typer.Option(min=1, help="Begin no further kill after this time, seconds")] = 7200.0,
    rate: Annotated[float, typer.Option(min=0.01, help="Chat requests per second")] = 2.0,
    feedback_interval_s: Annotated[float, typer.Option(min=0.01, help="Seconds between two feedback posts")] = 0.5,
    keep_state: Annotated[Path | None, typer.Option(help="New directory that state and log stay in")] = None,
    config: Annotated[Path, typer.Option(help="Serve config to start from")] = Path("serve_config.tiny.yaml"),
    state_dir: StateDir = Path("state"),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="HTTP port; none: a free one")] = None,
) -> None:
    """Kill processes of a server of our own at random, under load; exit code 1 if anything was lost."""
    from engine.tiny.build import ensure_tiny_assistant

    chosen = [name for name in KINDS if name in (wanted := [part.strip() for part in kinds.split(",")])]
    if not chosen or set(filter(None, wanted)) - set(KINDS):
        raise typer.BadParameter(f"kinds are {', '.join(KINDS)}; not {kinds!r}")
    own_servers()
    ensure_tiny_assistant(state_dir, show_progress=not as_json)
    options = Options(make_plan(kills, seed, chosen), seed, max_s, rate, feedback_interval_s)
    try:
        with new_directories(keep_state) as (directory, ray_dir):
            server = ServerProcess(
                directory,
                config,
                sections={"model": {"model_source": TINY_ASSISTANT}},
                models=state_dir / "models",
                ray_dir=ray_dir,
                port=port,
            )
            report = make_report(run(server, options))
    except (ServerError, OSError) as error:
        typer.secho(f"mace chaos: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    show(report, tables(report), as_json)
    raise typer.Exit(0 if report["passed"] else 1)


@dataclass(frozen=True, slots=True)
class Options:
    """One run."""

    plan: list[Strike]
    seed: int
    max_s: float
    rate_per_s: float
    """Chat requests."""
    feedback_interval_s: float


@contextmanager
def new_directories(keep: Path | None) -> Iterator[tuple[Path, Path]]:
    """Directories for the server and for Ray, both new and, unless the first is kept, removed at the end.

    Raises:
        ServerError: the directory to keep is there already: it may be somebody's state.
    """
    with tempfile.TemporaryDirectory(prefix="mace-", ignore_cleanup_errors=True) as scratch:
        if keep is not None and keep.exists():
            raise ServerError(f"{keep} exists; --keep-state wants a new directory")
        directory = Path(scratch) / "serve" if keep is None else keep.absolute()
        directory.mkdir(parents=True)
        yield directory, Path(scratch)


def run(server: ServerProcess, options: Options) -> Findings:
    """One run. Whatever happens, nothing of the server is left when this returns or raises."""
    started_s = time.monotonic()
    with server.ended_after():
        findings = asyncio.run(_under_load(server, options))
        findings.left_behind = server.end()
    findings.duration_s = time.monotonic() - started_s
    return findings


async def _under_load(server: ServerProcess, options: Options) -> Findings:
    """Start, load, kill, drain, read back."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with (
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=_CHAT_TIMEOUT_S) as openai,
        httpx.AsyncClient(base_url=server.url, limits=limits) as client,
    ):
        ledger, watch = Ledger(), Watch(client, server.state_dir)
        chat = Load(HttpPort(openai, "mace-tiny"), time.monotonic)
        feedback = Load(FeedbackPort(client, preferences(options.seed), ledger), time.monotonic)
        striker = Striker(server, watch, chat, feedback, ledger)
        note("starting the server")
        await server.start()
        watching = asyncio.create_task(watch.run())
        sending = asyncio.gather(
            chat.open_loop(questions(options.rate_per_s, options.seed)),
            write_feedback(feedback, options.feedback_interval_s),
        )
        try:
            stopped = await _strike(striker, options)
            sending.cancel()
            await asyncio.gather(feedback.drain(_DRAIN_S), chat.drain(_DRAIN_S))
            audit = ledger.audit(await read_all_feedback(client), await export_all_pairs(client))
            await asyncio.to_thread(watch.versions.look)
        finally:
            watching.cancel()
            sending.cancel()
            await asyncio.gather(watching, sending, feedback.drain(0), chat.drain(0), return_exceptions=True)
    return Findings(
        seed=options.seed,
        planned=len(options.plan),
        stopped=stopped,
        kills=striker.kills,
        requests=chat.records,
        ledger=ledger,
        audit=audit,
        versions=watch.versions,
        restarts=striker.restarts,
    )


async def _strike(striker: Striker, options: Options) -> str | None:
    """Carry out the plan; returns why it was not carried out to its end, if something went wrong."""
    give_up_s = time.monotonic() + options.max_s
    await striker.wait_for_training()
    for strike in options.plan:
        if time.monotonic() > give_up_s:
            note(f"{options.max_s:g} s are over; {len(options.plan) - len(striker.kills)} kills are left out")
            break
        try:
            kill = await striker.carry_out(strike)
        except ServerError as error:  # what was found is worth a report; one more start, to read it all back
            note(f"stopped: {error}")
            await striker.start_anew()
            return str(error)
        note(_line(kill, len(options.plan)))
    return None


def _line(kill: Kill, total: int) -> str:
    times = {"recovered": kill.recovery_s, "training": kill.training_s}
    texts = ", ".join(f"{name} {'never' if s is None else f'after {s:.1f} s'}" for name, s in times.items())
    lost = "unknown" if kill.steps_lost is None else kill.steps_lost
    return f"{kill.number}/{total} {kill.kind} ({kill.target}) at {kill.moment}: {texts}; steps lost {lost}"
