"""What a server costs that nobody asks anything, and how soon it answers then. `mace bench idle`.

A server of our own is started and left alone; then the CPU time of every process of it is read over a window, and
requests are sent with pauses between them, each the first one after a silence. With `--plain` the same is measured of
vLLM's own server on the same model, with LoRA enabled as ours has it.
"""

import asyncio
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml
from openai import AsyncOpenAI

from app.commands.connection import read_config
from benchmarks.harness.client import HttpPort, Load, Request, RequestRecord
from benchmarks.harness.energy import EnergyWatch, told
from benchmarks.harness.jobs import MeasurementError
from benchmarks.harness.report import AsJson, Out, StateDir, digits, ms, note, show, table_of
from benchmarks.harness.server import (
    ServerProcess,
    cores_by_role,
    cpu_seconds,
    own_servers,
    plain_server,
    role_of,
    title_of,
)
from benchmarks.studies.chaos.command import new_directories
from core.config import AppArgs

MAX_ENGINE_CORES = 0.02
MAX_CORES = {True: 0.15, False: 0.05}
"""All processes together, with Ray's dashboard and without."""

_PAUSE_S = 3.0
"""Between two requests: vLLM's worker sleeps one second after its last message."""


def main(
    as_json: AsJson = False,
    config: Annotated[Path, typer.Option(help="Serve config to start from")] = Path("serve_config.yaml"),
    state_dir: StateDir = Path("state"),
    settle: Annotated[float, typer.Option(min=0, help="Seconds without a request before the window")] = 30.0,
    window: Annotated[float, typer.Option(min=1, help="Seconds of the window")] = 60.0,
    requests: Annotated[int, typer.Option(min=1, help="Requests after a silence")] = 10,
    dashboard: Annotated[bool, typer.Option(help="With Ray's dashboard")] = True,
    plain: Annotated[bool, typer.Option(help="Measure plain vLLM after it")] = False,
    out: Out = None,
) -> None:
    """Measure CPU time without requests, and the first request after it; exit code 1 if a target is missed."""
    from engine.model_source import resolve_model

    document = read_config(config)
    settings = {**document["applications"][0].get("args", {}), "ray_dashboard": dashboard}
    document["applications"][0]["args"] = settings
    args = AppArgs.model_validate(settings)
    model_dir = resolve_model(args.model, state_dir, show_progress=not as_json).absolute()
    own_servers()
    reports = {}
    for name in ("mace", "plain") if plain else ("mace",):
        with new_directories(None) as (directory, ray_dir):
            config = directory / "measured.yaml"
            config.write_text(yaml.safe_dump(document), encoding="utf-8")
            if name == "mace":
                server = ServerProcess(directory, config, models=state_dir / "models", ray_dir=ray_dir)
            else:
                server = plain_server(directory, config, model_dir)
            with server.running():
                if name == "mace":
                    server.wait_for_profile()
                note(f"{name}: ready, idle for {settle:.0f} s and measured for {window:.0f} s")
                reports[name] = measure(server, args.model.model_id, settle, window, requests)
    report = make_report(reports, dashboard)
    show(report, _tables(report), as_json, out)
    raise typer.Exit(0 if all(check["passed"] for check in report["checks"]) else 1)


def measure(
    server: ServerProcess, model: str, settle_s: float, window_s: float, num_requests: int
) -> dict[str, Any]:
    """Cores by role over the window, resident bytes, the requests after it, and the machine's energy in both."""
    time.sleep(settle_s)
    energy = EnergyWatch()
    before, started_s = cpu_seconds(server.members()), time.monotonic()
    time.sleep(window_s)
    after, elapsed_s = cpu_seconds(server.members()), time.monotonic() - started_s
    energy.add()
    cores = cores_by_role(before, after, elapsed_s)
    resident_bytes: dict[str, int] = {}
    for process in after:
        role = role_of(title_of(process))
        resident_bytes[role] = resident_bytes.get(role, 0) + _resident_bytes(process)
    answers = asyncio.run(_ask(server.url, model, num_requests))
    ttfts_s = [record.ttft_s for record in answers if record.ttft_s is not None]
    energy.add(forward_s=sum((record.ended_s or 0.0) - record.scheduled_s for record in answers))
    return {
        "cores": {role: round(share, 4) for role, share in sorted(cores.items(), key=lambda item: -item[1])},
        "all_cores": round(sum(cores.values()), 4),
        "processes": len(after),
        "resident_mib": {role: size >> 20 for role, size in resident_bytes.items()},
        "energy": energy.to_wire(sum(record.num_tokens for record in answers), 0),
        "first_request_s": {"p50": statistics.median(ttfts_s), "max": max(ttfts_s), "all": ttfts_s},
    }


def make_report(reports: dict[str, dict[str, Any]], has_dashboard: bool) -> dict[str, Any]:
    """The measurements with the targets that they are held to."""
    mace = reports["mace"]
    engine_cores = sum(mace["cores"].get(role, 0.0) for role in ("engine core", "worker"))
    checks = [
        _check("cores of worker and engine core", engine_cores, MAX_ENGINE_CORES),
        _check("cores of all processes", mace["all_cores"], MAX_CORES[has_dashboard]),
    ]
    if "plain" in reports:
        plain_s = reports["plain"]["first_request_s"]["p50"]
        checks.append(_check("first request, seconds", mace["first_request_s"]["p50"], plain_s))
    return {**reports, "has_dashboard": has_dashboard, "checks": checks}


def _check(name: str, value: float, at_most: float) -> dict[str, Any]:
    return {"check": name, "value": round(value, 4), "at_most": round(at_most, 4), "passed": value <= at_most}


def _tables(report: dict[str, Any]) -> Iterable[Any]:
    servers = [name for name in ("mace", "plain") if name in report]
    roles = dict.fromkeys(role for name in servers for role in report[name]["cores"])
    rows = [{"role": role, **{name: report[name]["cores"].get(role) for name in servers}} for role in roles]
    rows.append({"role": "all", **{name: report[name]["all_cores"] for name in servers}})
    columns = [(name, name, digits(3)) for name in servers]
    yield table_of("Cores while idle", rows, [("role", "role", str), *columns])
    for name in servers:
        first = report[name]["first_request_s"]
        yield f"{name}: first token after a silence p50 {ms(first['p50'])}, at most {ms(first['max'])}"
        yield f"{name}: {told(report[name]['energy'])}"
    for check in report["checks"]:
        verdict = "met" if check["passed"] else "missed"
        yield f"{verdict}: {check['check']} {check['value']:.4g} (at most {check['at_most']:.4g})"


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


async def _ask(url: str, model: str, count: int) -> list[RequestRecord]:
    """Requests with a silence before each.

    Raises:
        MeasurementError: a request failed.
    """
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        load = Load(HttpPort(client, model))
        answers = []
        for number in range(count):
            await asyncio.sleep(_PAUSE_S)
            prompt = [{"role": "user", "content": f"What is {number} plus 2?"}]
            record = await load.ask(Request(f"idle-{number}", prompt, max_tokens=8))
            if record.ttft_s is None:
                raise MeasurementError(f"a request failed: {record.error or 'it has no token'}")
            answers.append(record)
    return answers
