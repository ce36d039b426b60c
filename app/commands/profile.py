"""`mace profile`: measure this device, fit the latency and memory models, draw them; and what KV pruning costs.

`measure`, `fit` and `report` are about latency and memory; `pruning` is about accuracy on this model.
"""

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.commands.connection import fail, read_config
from core.config import KV_PRUNING_SINK_TOKENS, AppArgs
from core.errors import ConfigError, MaceError
from engine.pruning.gate import METHOD, Decision, PruningReport, decide, pruning_report_path
from engine.pruning.tasks import RecallKind, make_recall
from profiler.device import describe_device, worker_threads
from profiler.profile import Profile

if TYPE_CHECKING:
    from engine.pruning.reader import PrunedReader, TokenPassage

app = typer.Typer(no_args_is_help=True, help="Measure this device, fit the latency and memory models, draw them.")

_CONFIG = Annotated[Path, typer.Option(help="Ray Serve config file; its args decide model and engine")]
_MODEL = Annotated[str | None, typer.Option(help="Model source instead of the config's")]
_STATE_DIR = Annotated[Path | None, typer.Option(help="State directory instead of the config's")]
_OUT = Annotated[Path | None, typer.Option(help="File to write; default is where `mace serve` looks")]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON")]

_DEFAULT_CONFIG = Path("serve_config.yaml")
_PROGRESS_POINTS = 20
_KINDS: tuple[RecallKind, ...] = ("needle", "qa")
_FRACTIONS = (0.1, 0.25, 0.5)
"""Measured shares of the blocks, beside `kv_pruning.max_fraction`."""
_DEFAULT_CONTEXT_TOKENS = 1024
_RESERVED_TOKENS = 128
"""Room for a continuation, or a question and its reply."""
_CONTINUATION_TOKENS = 96
_QUESTIONS = 4
"""About each context."""
_SEED = 0
"""Seed of the generated texts and questions."""


@app.command()
def measure(
    config: _CONFIG = _DEFAULT_CONFIG,
    model: _MODEL = None,
    state_dir: _STATE_DIR = None,
    out: _OUT = None,
    seconds: Annotated[float, typer.Option(min=1, help="Measuring time after the engine started")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of prompts and of the hold-out split")] = 0,
    as_json: _JSON = False,
) -> None:
    """Start the engine, measure a grid of batches and slices, fit, and write a profile."""
    with _clear_errors():
        args = _read_args(config, model, state_dir)
        profile, usual_path = asyncio.run(_measure(args, seconds, seed, show_progress=not as_json))
        path = out or usual_path
        profile.save(path)
    _show(profile, path, as_json)


@app.command()
def fit(
    path: Annotated[Path, typer.Argument(help="Profile JSON")],
    out: Annotated[Path | None, typer.Option(help="Write the new profile here; default: write nothing")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the hold-out split; default: the profile's")] = None,
    as_json: _JSON = False,
) -> None:
    """Fit again from the raw samples of a profile and print the hold-out errors."""
    from profiler.fit import fit_raw

    with _clear_errors():
        old = Profile.load(path)
        origin = old.origin if seed is None else old.origin.model_copy(update={"seed": seed})
        profile = fit_raw(old.samples, origin, kv_bytes_per_token=old.memory.kv_bytes_per_token)
        profile = profile.with_work(old.work)
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

    with _clear_errors():
        target = out or path.with_suffix(".png")
        draw_report(Profile.load(path), target)
    typer.echo(str(target))


@app.command()
def pruning(
    config: _CONFIG = _DEFAULT_CONFIG,
    model: _MODEL = None,
    state_dir: _STATE_DIR = None,
    out: _OUT = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Text for the log-prob: JSONL, JSON, CSV or Parquet file, directory of save_to_disk, hub id"
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data set [default: train]")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of plain text [default: text]")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of prompts, instead of plain text")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column of their responses")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Passages, and contexts of each task")] = 32,
    context_tokens: Annotated[
        int | None, typer.Option(min=64, help="Length of a context [default: 1024, or what the model takes]")
    ] = None,
    block_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV block size [default: engine_kwargs.block_size, or 32]")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Measure with this adapter directory on")] = None,
    as_json: _JSON = False,
) -> None:
    """Measure the log-prob and the answers that KV pruning costs, and say whether it may switch on."""
    with _clear_errors():
        from deployments.monitors.profiling import origin_of
        from engine.fingerprint import fingerprint
        from engine.model_source import resolve_model
        from engine.pruning.accuracy import loaded_model, measure
        from engine.pruning.reader import PrunedReader
        from engine.vllm.compat import CPU_PRUNING_BLOCK_TOKENS, worker_binding

        columns = (text_column, prompt_column, response_column)
        if any(columns) and dataset is None:
            raise ConfigError("columns need a --dataset")
        if (prompt_column is None) != (response_column is None):
            raise ConfigError("--prompt-column and --response-column go together")
        args = _read_args(config, model, state_dir)
        started_s = time.monotonic()
        model_dir = resolve_model(args.model, args.state_dir, show_progress=not as_json)
        known_as = fingerprint(model_dir)
        num_threads = worker_threads(worker_binding(args, model_dir))
        size = block_tokens or int(args.engine.engine_kwargs.get("block_size") or CPU_PRUNING_BLOCK_TOKENS)
        with loaded_model(model_dir, args.model, adapter, num_threads) as (network, tokenizer):
            reader = PrunedReader(network, tokenizer, size, args.kv_pruning.recent_tokens)
            length = _context_tokens(context_tokens, args.model.max_model_len, network.config)
            rng = random.Random(_SEED)
            passages = _passages(reader, dataset, split, columns, (samples, length, _CONTINUATION_TOKENS), rng)
            recalls = (
                make_recall(kind, length, _QUESTIONS, reader.count_tokens, rng)
                for kind in _KINDS
                for _ in range(samples)
            )
            note = _counter((len(_KINDS) + 1) * samples, is_quiet=as_json)
            measured = measure(reader, passages, recalls, {*_FRACTIONS, args.kv_pruning.max_fraction}, note)
        report = PruningReport(
            origin=origin_of(args, seed=_SEED, num_threads=num_threads),
            model_source=args.model.model_source,
            fingerprint=known_as,
            adapter=str(adapter) if adapter else None,
            method=METHOD,
            block_tokens=size,
            sink_tokens=KV_PRUNING_SINK_TOKENS,
            recent_tokens=args.kv_pruning.recent_tokens,
            context_tokens=statistics.fmean(measured.context_tokens),
            dataset=dataset,
            num_skipped=measured.num_skipped,
            baseline=measured.baselines(),
            baseline_nats_per_token=measured.baseline_nats_per_token,
            fractions=measured.results(),
            elapsed_s=round(time.monotonic() - started_s, 1),
        )
        path = out or pruning_report_path(args.state_dir, describe_device(num_threads), args.model.model_id)
        report.save(path)
    gated = args.kv_pruning.model_copy(update={"require_gate": True})
    _show_pruning(report, decide(report, gated, args.model), path, as_json)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """One line instead of a traceback; exit code 2 for wrong settings, 1 for what went wrong later."""
    try:
        yield
    except MaceError as error:
        fail(error, 2 if isinstance(error, ConfigError) else 1)


def _read_args(config: Path, model: str | None, state_dir: Path | None) -> AppArgs:
    """The `args:` of the config's application, with the options of the command line on top; or a ConfigError."""
    from app.main import parse_args

    args: dict[str, Any] = dict(read_config(config)["applications"][0].get("args") or {})
    if model is not None:
        args["model"] = {"model_id": Path(model).name.replace(":", "-"), "model_source": model}
    if state_dir is not None:
        args["state_dir"] = str(state_dir)
    return parse_args(args)


async def _measure(args: AppArgs, seconds: float, seed: int, *, show_progress: bool) -> tuple[Profile, Path]:
    """A profile of this device, and where `mace serve` looks for it."""
    from deployments.monitors.profiling import (
        measure_plan,
        origin_of,
        with_profile_path,
        with_pruning_gate,
        with_trainable_model,
    )
    from engine.model_source import resolve_model
    from engine.vllm.compat import configure_environment
    from engine.vllm.engine import HybridEngine
    from profiler.measure import Measurement, measure_profile

    def note(measurement: Measurement) -> None:
        if show_progress and measurement.num_points % _PROGRESS_POINTS == 0:
            done = f"{measurement.num_points} points, {len(measurement.samples)} iterations"
            typer.echo(f"{done}, {measurement.measured_s:.0f} s", err=True)

    model_dir = resolve_model(args.model, args.state_dir, show_progress=show_progress)
    args, _ = with_trainable_model(args, model_dir)
    configure_environment(args, model_dir)
    # The slices of a profile are those of the engine's device; what moving them changes is measured beside.
    args = args.model_copy(
        update={"offload": args.offload.model_copy(update={"optimizer": "never", "checkpoint": "never"})}
    )
    args, _ = with_pruning_gate(with_profile_path(args, model_dir), model_dir)  # what is measured is what serves
    assert args.profile.path is not None  # filled in
    origin = origin_of(args, seed=seed)
    engine = await HybridEngine.start(args, str(model_dir))
    try:
        plan = measure_plan(engine, args, budget_s=seconds, seed=seed)
        profile = await measure_profile(engine, plan, origin, engine.kv_bytes_per_token, note)
        profile = profile.with_work(await engine.measure_work())
    finally:
        engine.shutdown()
    return profile, args.profile.path


def _show(profile: Profile, path: Path, as_json: bool) -> None:
    if as_json:
        summary = profile.model_dump(mode="json", exclude={"samples"})
        typer.echo(json.dumps({"path": str(path), **summary}, indent=2))
        return
    title = f"{profile.origin.model} on {profile.origin.device}"
    table = Table("what", "rows", "held out", "median error", "p95 error", title=title)
    rows = [("forward pass", len(profile.samples.forward), profile.forward_error)]
    for kind, error in sorted(profile.slice_errors.items()):
        rows.append((kind.value, len(profile.samples.slices.get(kind, ())), error))
    for name, num_rows, error in rows:
        table.add_row(name, str(num_rows), str(error.num_rows), f"{error.median:.1%}", f"{error.p95:.1%}")
    Console().print(table)
    for work, costs in profile.work.items():
        for place, cost in costs.items():
            joules = (
                "no sensor of energy" if cost.watts is None else f"{cost.seconds * cost.watts:.3g} J over idle"
            )
            typer.echo(f"{work} on the {place}: {1e3 * cost.seconds:.3g} ms, {joules}")
    typer.echo(f"overhead {1e3 * profile.overhead_s:.2f} ms an iteration; profile: {path}")


def _counter(total: int, *, is_quiet: bool) -> Callable[[], None]:
    """A function that counts its calls, and says on stderr how far it is, ten times."""
    calls = itertools.count(1)

    def note() -> None:
        num_done = next(calls)
        if not is_quiet and num_done * 10 // total != (num_done - 1) * 10 // total:
            typer.echo(f"{num_done} of {total} contexts", err=True)

    return note


def _context_tokens(asked: int | None, max_model_len: int | None, config: Any) -> int:
    """Length of a context: what is asked for (a ConfigError if that is too long), else the default, if it fits."""
    limits = [limit for limit in (max_model_len, getattr(config, "max_position_embeddings", None)) if limit]
    most = min(limits, default=_DEFAULT_CONTEXT_TOKENS + _RESERVED_TOKENS) - _RESERVED_TOKENS
    if asked is not None and asked > most:
        raise ConfigError(
            f"--context-tokens: the model takes {most}, with room for {_RESERVED_TOKENS} more behind"
        )
    return asked or min(_DEFAULT_CONTEXT_TOKENS, most)


def _passages(
    reader: "PrunedReader",
    dataset: str | None,
    split: str | None,
    columns: tuple[str | None, str | None, str | None],
    sizes: tuple[int, int, int],
    rng: random.Random,
) -> "Iterator[TokenPassage]":
    """Passages out of the columns (text, prompt, response) of the data set, or generated ones.

    `sizes`: number of passages, tokens of a context, tokens of its continuation.
    """
    from engine.pruning.passages import generated_passages, reply_passages, text_passages

    text, prompt, response = columns
    if dataset is None:
        return generated_passages(reader, *sizes, rng)
    if prompt and response:
        return reply_passages(reader, _rows(dataset, split), prompt, response, *sizes)
    return text_passages(reader, _rows(dataset, split), text or "text", *sizes)


def _rows(name: str, split: str | None) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set; those that cannot be decoded end it with an error."""
    from app.importing.sources import open_source

    for row in open_source(name, split).rows(0):
        if row.error is not None:
            raise row.error
        if not isinstance(row.value, Mapping):
            raise ConfigError(f"{name}: row {row.number} is not a record")
        yield row.value


def _show_pruning(report: PruningReport, decision: Decision, path: Path, as_json: bool) -> None:
    if as_json:
        verdict = {"allowed": decision.allowed, "reason": decision.reason}
        typer.echo(
            json.dumps({"path": str(path), "decision": verdict, **report.model_dump(mode="json")}, indent=2)
        )
        return
    kinds = list(report.baseline)
    title = f"{report.origin.model}: {report.method}, blocks of {report.block_tokens}"
    table = Table("dropped", "of blocks", "log-prob drop, nats/token", *kinds, title=title)
    for result in report.fractions:
        answers = [
            f"{result.tasks[kind].accuracy:.0%} ({0.0 - result.tasks[kind].drop.mean:+.1%})" for kind in kinds
        ]
        blocks = f"{result.dropped_blocks:.1f} of {result.total_blocks:.1f}"
        drop = result.logprob_drop
        spread = f"{drop.mean:+.4f} [{drop.low:+.4f}, {drop.high:+.4f}]"
        table.add_row(f"{result.fraction:.0%}", blocks, spread, *answers)
    console = Console()
    console.print(table)
    for kind, baseline in report.baseline.items():
        if not baseline.is_solved:
            console.print(
                f"{kind}: the model answers {baseline.accuracy:.0%} unpruned where guessing gives "
                f"{baseline.guess_accuracy:.0%}, so this task cannot decide",
                highlight=False,
            )
    console.print(
        f"unpruned {report.baseline_nats_per_token:.3f} nats/token; contexts of {report.context_tokens:.0f} tokens; "
        f"{report.elapsed_s:.0f} s; report: {path}",
        highlight=False,
    )
    console.print("may switch on:" if decision.allowed else "refused:", decision.reason, highlight=False)
