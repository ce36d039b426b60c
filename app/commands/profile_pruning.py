"""`mace profile pruning`: what KV pruning costs in accuracy on this model, and whether it may switch on."""

import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.commands.profile_settings import CONFIG_OPTION, JSON_OPTION, clear_errors, read_args
from core.config import AppArgs
from core.errors import ConfigError
from deployments.monitors.profiling import origin_of
from engine.pruning.gate import Decision, Estimate, PruningReport, decide, pruning_report_path
from engine.pruning.tasks import RecallKind, make_recall
from profiler.device import describe_device, worker_threads

if TYPE_CHECKING:
    from engine.pruning.reader import PrunedReader, TokenPassage

_KINDS: tuple[RecallKind, ...] = ("needle", "qa")
_DEFAULT_CONTEXT_TOKENS = 1024
_RESERVED_TOKENS = 128
"""For a continuation, or a question and its reply."""
_CONTINUATION_TOKENS = 96
_QUESTIONS = 4
"""About each context."""


@dataclass(frozen=True, slots=True)
class PruningOptions:
    """What the command line says."""

    dataset: str | None
    split: str | None
    text_column: str | None
    prompt_column: str | None
    response_column: str | None
    samples: int
    context_tokens: int | None
    block_tokens: int | None
    fractions: tuple[float, ...]
    adapter: Path | None
    seed: int


def pruning(
    config: CONFIG_OPTION = Path("serve_config.yaml"),
    model: Annotated[str | None, typer.Option(help="Model source instead of the config's")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="State directory instead of the config's")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default is where `mace serve` looks")] = None,
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
    fractions: Annotated[str, typer.Option(help="Shares of the blocks to drop")] = "0.1,0.25,0.5",
    method: Annotated[str | None, typer.Option(help="keydiff or key_norm [default: the config's]")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Measure with this adapter directory on")] = None,
    seed: Annotated[int, typer.Option(help="Of the generated texts and questions")] = 0,
    as_json: JSON_OPTION = False,
) -> None:
    """Measure the log-prob and the answers that KV pruning costs, and say whether it may switch on."""
    with clear_errors():
        args = read_args(config, model, state_dir)
        if method is not None:
            pruned = type(args.kv_pruning).model_validate({**args.kv_pruning.model_dump(), "method": method})
            args = args.model_copy(update={"kv_pruning": pruned})
        shares = _parse_fractions(fractions, args.kv_pruning.max_fraction)
        options = PruningOptions(
            dataset=dataset,
            split=split,
            text_column=text_column,
            prompt_column=prompt_column,
            response_column=response_column,
            samples=samples,
            context_tokens=context_tokens,
            block_tokens=block_tokens,
            fractions=shares,
            adapter=adapter,
            seed=seed,
        )
        report, device = measure_pruning(args, options, show_progress=not as_json)
        path = out or pruning_report_path(args.state_dir, device, args.model.model_id)
        report.save(path)
    gated = args.kv_pruning.model_copy(update={"require_gate": True})
    _show(report, decide(report, gated, args.model), path, as_json)


def measure_pruning(args: AppArgs, options: PruningOptions, *, show_progress: bool) -> tuple[PruningReport, str]:
    """The report on the configured model, and the name of the device that the engine would run on.

    Raises:
        MaceError: model, adapter or data set cannot be used.
    """
    from engine.model_source import resolve_model
    from engine.pruning.accuracy import loaded_model, measure
    from engine.pruning.reader import PrunedReader, PruningPlan
    from engine.pruning.scores import make_scorer
    from engine.vllm.compat import CPU_PRUNING_BLOCK_TOKENS, worker_binding

    started_s = time.monotonic()
    model_dir = resolve_model(args.model, args.state_dir, show_progress=show_progress)
    num_threads = worker_threads(worker_binding(args, model_dir))
    device = describe_device(num_threads)
    pruning = args.kv_pruning
    size = options.block_tokens or int(args.engine.engine_kwargs.get("block_size") or CPU_PRUNING_BLOCK_TOKENS)
    plan = PruningPlan(make_scorer(pruning.method), size, pruning.sink_tokens, pruning.recent_tokens)
    with loaded_model(model_dir, args.model, options.adapter, num_threads) as (network, tokenizer):
        reader = PrunedReader(network, tokenizer, plan)
        length = _context_tokens(options.context_tokens, args.model.max_model_len, network.config)
        rng = random.Random(options.seed)
        recalls = (
            make_recall(kind, length, _QUESTIONS, reader.count_tokens, rng)
            for kind in _KINDS
            for _ in range(options.samples)
        )
        note = _Counter((len(_KINDS) + 1) * options.samples) if show_progress else None
        measured = measure(reader, _passages(reader, options, length, rng), recalls, options.fractions, note)
    report = PruningReport(
        origin=origin_of(args, seed=options.seed, num_threads=num_threads),
        model_source=args.model.model_source,
        adapter=str(options.adapter) if options.adapter else None,
        method=pruning.method,
        block_tokens=size,
        sink_tokens=pruning.sink_tokens,
        recent_tokens=pruning.recent_tokens,
        context_tokens=measured.mean_context_tokens,
        dataset=options.dataset,
        num_skipped=measured.num_skipped,
        baseline=measured.baselines(),
        baseline_nats_per_token=measured.baseline_nats_per_token,
        fractions=measured.results(),
        elapsed_s=round(time.monotonic() - started_s, 1),
    )
    return report, device


class _Counter:
    """Says on stderr how far it is, ten times."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        if self._done * 10 // self._total != (self._done - 1) * 10 // self._total:
            typer.echo(f"{self._done} of {self._total} contexts", err=True)


def _parse_fractions(text: str, configured: float) -> tuple[float, ...]:
    """The shares asked for and the configured one.

    Raises:
        ConfigError: not a list of numbers above 0 and up to 0.9.
    """
    try:
        asked = {float(part) for part in text.split(",") if part.strip()}
    except ValueError:
        asked = {-1.0}
    if not asked or not all(0 < fraction <= 0.9 for fraction in asked):
        raise ConfigError(f"--fractions: {text!r} is not a list of shares above 0 and up to 0.9, as 0.1,0.25,0.5")
    return tuple(sorted(asked | {configured}))


def _context_tokens(asked: int | None, max_model_len: int | None, config: Any) -> int:
    """What is asked for, if the model takes it; else the default or as much as the model takes.

    Raises:
        ConfigError: more is asked for than the model takes.
    """
    limits = [limit for limit in (max_model_len, getattr(config, "max_position_embeddings", None)) if limit]
    most = min(limits, default=_DEFAULT_CONTEXT_TOKENS + _RESERVED_TOKENS) - _RESERVED_TOKENS
    if asked is not None and asked > most:
        raise ConfigError(
            f"--context-tokens: the model takes {most}, with room for {_RESERVED_TOKENS} more behind"
        )
    return asked or min(_DEFAULT_CONTEXT_TOKENS, most)


def _passages(
    reader: "PrunedReader", options: PruningOptions, length: int, rng: random.Random
) -> "Iterator[TokenPassage]":
    from engine.pruning.passages import generated_passages, reply_passages, text_passages

    if options.dataset is None:
        if options.text_column or options.prompt_column or options.response_column:
            raise ConfigError("columns need a --dataset")
        return generated_passages(reader, options.samples, length, _CONTINUATION_TOKENS, rng)
    rows = _rows(options.dataset, options.split)
    if (options.prompt_column is None) != (options.response_column is None):
        raise ConfigError("--prompt-column and --response-column go together")
    if options.prompt_column and options.response_column:
        columns = (options.prompt_column, options.response_column)
        return reply_passages(reader, rows, *columns, options.samples, length, _CONTINUATION_TOKENS)
    return text_passages(
        reader, rows, options.text_column or "text", options.samples, length, _CONTINUATION_TOKENS
    )


def _rows(name: str, split: str | None) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set; those that cannot be decoded end it with an error."""
    from app.importing.sources import open_source

    for row in open_source(name, split).rows(after=0):
        if row.error is not None:
            raise row.error
        if not isinstance(row.value, Mapping):
            raise ConfigError(f"{name}: row {row.number} is not a record")
        yield row.value


def _show(report: PruningReport, decision: Decision, path: Path, as_json: bool) -> None:
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
        answers = [f"{result.tasks[kind].accuracy:.0%} ({_signed(result.tasks[kind].drop)})" for kind in kinds]
        blocks = f"{result.dropped_blocks:.1f} of {result.total_blocks:.1f}"
        table.add_row(f"{result.fraction:.0%}", blocks, _interval(result.logprob_drop), *answers)
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


def _interval(drop: Estimate) -> str:
    return f"{drop.mean:+.4f} [{drop.low:+.4f}, {drop.high:+.4f}]"


def _signed(drop: Estimate) -> str:
    return f"{0.0 - drop.mean:+.1%}"
