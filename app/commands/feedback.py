"""`mace feedback`: import, export and list."""

import json
import time
from contextlib import closing, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from app.commands.connection import URL_OPTION, api_key, call, download
from app.importing.delivery import DeliveryError, DryRun, Server
from app.importing.importer import Importer, Progress, ProgressFile, Tally
from app.importing.sources import Source, SourceError, open_source

_INTERRUPTED = 130
_SHOWN_REASONS = 20
_REASON_CHARS = 200

app = typer.Typer(no_args_is_help=True, help="Import, export and list feedback.")


class Format(StrEnum):
    """Export formats."""

    TRL = "trl"
    OPENAI = "openai"


@app.command("export")
def export_file(
    path: Annotated[Path, typer.Argument(help="File to write")],
    format: Annotated[Format, typer.Option(help="Row format")] = Format.TRL,
    url: URL_OPTION = "http://127.0.0.1:8000",
) -> None:
    """Write all preference pairs as JSONL."""
    download(url, "/v1/feedback/export", {"format": format.value}, path)
    typer.echo(f"wrote {path}")


@app.command("list")
def list_records(
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    after: Annotated[str | None, typer.Option(help="Id of the record to go on after")] = None,
    url: URL_OPTION = "http://127.0.0.1:8000",
) -> None:
    """Show stored records as JSON, oldest first."""
    parameters = {"limit": limit, **({"after": after} if after else {})}
    typer.echo(json.dumps(call(url, "GET", "/v1/feedback", params=parameters).json(), indent=2))


class ImportBar:
    """Rows per second, accepted, duplicates and rejected; and messages above the bar."""

    def __init__(self, console: Console, is_shown: bool = True) -> None:
        self._console = console
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[counts]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not is_shown,
        )
        self._task: TaskID | None = None
        self._rows_before = 0

    def start(self, source: Source, progress: Progress) -> None:
        """Show the bar."""
        self._rows_before = progress.tally.num_rows
        self._task = self._bar.add_task(source.label[-40:], total=source.total, counts="")
        self._bar.start()

    def settled(self, progress: Progress, done: int) -> None:
        """A batch is settled; reading is `done` of the source's total far."""
        if self._task is None:
            return
        tally = progress.tally
        elapsed_s = self._bar.tasks[self._task].elapsed or 0.0
        rate = f"{(tally.num_rows - self._rows_before) / elapsed_s:,.0f} rows/s" if elapsed_s else ""
        counts = (
            f"{tally.num_rows:,} rows {rate}  accepted {tally.num_accepted:,}  "
            f"duplicates {tally.num_duplicates:,}  rejected {tally.num_rejected:,}"
        )
        self._bar.update(self._task, completed=done, counts=counts)

    def waits(self, reason: str, delay_s: float) -> None:
        """The server is away; the batch is sent again after the delay."""
        self.say(f"{reason}; trying again in {delay_s:.1f} s")

    def say(self, message: str) -> None:
        """A line above the bar. It stays."""
        self._console.print(Text(f"mace: {message}", style="yellow"))

    def close(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._bar.stop()


@app.command("import")
def import_feedback(
    source: Annotated[
        str,
        typer.Argument(help="JSONL, JSON, CSV (also .gz) or Parquet file, directory of save_to_disk, or hub id"),
    ],
    url: URL_OPTION = "http://127.0.0.1:8000",
    split: Annotated[str | None, typer.Option(help="Split of a saved or hub data set [default: train]")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub data set")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a hub data set while it is fetched")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first rows")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Take a plain-text prompt as a user message")] = False,
    rejected: Annotated[Path | None, typer.Option(dir_okay=False, help="Write refused rows here as JSONL")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin at the first row again")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the rows; no server is needed")] = False,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a server that is away")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Import preference data; an interrupted import goes on where it stopped, and adds nothing twice."""
    started_s = time.monotonic()
    console = Console(stderr=True)
    try:
        with closing(ImportBar(console, is_shown=not as_json)) as bar:
            sink = None if dry_run else Server(url, {"Authorization": f"Bearer {api_key()}"}, patience, bar.waits)
            with closing(sink) if sink else nullcontext():
                if sink:
                    sink.check()
                opened = open_source(source, split, config, streaming)
                file = None if dry_run else ProgressFile(opened.identity, url.rstrip("/"), f"chat={chat}")
                importer = Importer(
                    opened,
                    sink or DryRun(),
                    chat=chat,
                    limit=limit,
                    rejected=rejected,
                    progress_file=file,
                    on_settled=bar.settled,
                )
                before = _run(importer, file, restart, opened, bar)
    except (SourceError, DeliveryError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'import'}: {error.strerror or error}")
    report = _report(importer.progress, importer.progress.tally.num_rows - before, started_s, dry_run)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(Console(), report, importer.progress.tally, rejected)
    if report["rows"] and report["rejected"] == report["rows"]:
        raise typer.Exit(1)


def _run(importer: Importer, file: ProgressFile | None, restart: bool, source: Source, bar: ImportBar) -> int:
    """Import; returns the rows that earlier runs had settled."""
    if file and restart:
        file.remove()
    had_progress = file is not None and file.load() is not None
    if importer.resume():
        bar.say(f"going on behind row {importer.progress.next_after:,}; --restart begins at the first row")
    elif had_progress:
        bar.say("the server does not know what an earlier run sent to it: beginning at the first row")
    before = importer.progress.tally.num_rows
    bar.start(source, importer.progress)
    try:
        importer.run()
    except KeyboardInterrupt:
        bar.close()
        _say_how_to_go_on(importer.progress, "interrupted", file)
        raise typer.Exit(_INTERRUPTED) from None
    except (SourceError, DeliveryError, OSError):
        bar.close()
        _say_how_to_go_on(importer.progress, "stopped", file)
        raise
    return before


def _say_how_to_go_on(progress: Progress, what: str, file: ProgressFile | None) -> None:
    message = f"mace: {what} behind row {progress.next_after:,}"
    if file is not None:
        message += ", up to there everything is committed or refused; the same command goes on from there"
    typer.secho(message, fg="yellow", err=True)


def _fail(message: str) -> None:
    typer.secho(f"mace: {message}", fg="red", err=True)
    raise typer.Exit(1)


def _report(progress: Progress, num_new: int, started_s: float, dry_run: bool) -> dict[str, Any]:
    tally, elapsed_s = progress.tally, time.monotonic() - started_s
    return {
        "dry_run": dry_run,
        "rows": tally.num_rows,
        "rows_this_run": num_new,
        "accepted": tally.num_accepted,
        "duplicates": tally.num_duplicates,
        "rejected": tally.num_rejected,
        "formats": dict(tally.formats),
        "dropped_columns": dict(tally.dropped_columns),
        "reasons": [
            {"reason": reason.example, "param": reason.param, "count": reason.count, "first_row": reason.first_row}
            for reason in _by_count(tally)
        ],
        "elapsed_s": round(elapsed_s, 3),
        "rows_per_s": round(num_new / elapsed_s, 1) if elapsed_s > 0 else None,
    }


def _by_count(tally: Tally) -> list[Any]:
    return sorted(tally.reasons.values(), key=lambda reason: (-reason.count, reason.first_row))


def _show(console: Console, report: dict[str, Any], tally: Tally, rejected: Path | None) -> None:
    stored = f"{report['accepted']:,} accepted, {report['duplicates']:,} duplicates"
    taken = f"{report['accepted']:,} usable" if report["dry_run"] else stored
    formats = ", ".join(f"{count:,} {name}" for name, count in tally.formats.most_common())
    console.print(
        f"{report['rows']:,} rows: {taken}, {report['rejected']:,} rejected ({report['rows_per_s']:,} rows/s)",
        highlight=False,
    )
    if formats:
        console.print(f"formats: {formats}", highlight=False)
    if tally.dropped_columns:
        console.print(
            f"columns not taken: {', '.join(sorted(tally.dropped_columns))}", highlight=False, markup=False
        )
    if not tally.reasons:
        return
    table = Table("rows", "first", "column", "reason")
    for reason in _by_count(tally)[:_SHOWN_REASONS]:
        table.add_row(f"{reason.count:,}", f"{reason.first_row:,}", *_cells(reason.param, reason.example))
    console.print(table)
    if len(tally.reasons) > _SHOWN_REASONS:
        console.print(f"... and {len(tally.reasons) - _SHOWN_REASONS} more reasons", highlight=False)
    where = f"refused rows are in {rejected}" if rejected else "--rejected FILE writes the refused rows"
    console.print(where, highlight=False, markup=False)


def _cells(param: str | None, example: str) -> tuple[Any, Any]:
    """The text of a row is not markup."""
    short = example if len(example) <= _REASON_CHARS else example[: _REASON_CHARS - 1] + "…"
    return Text(param or ""), Text(short)
