"""`mace feedback`: import, export and list."""

import json
import os
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from app.commands.connection import URL_OPTION, call, download, fail, headers
from app.commands.host import replace_home
from app.importing.delivery import DeliveryError, DryRun, Server
from app.importing.importer import Importer, Progress, ProgressFile, Reason, Tally
from app.importing.sources import Source, SourceError, open_source
from core.errors import ConfigError

_INTERRUPTED = 130
_SHOWN_REASONS = 20
_REASON_CHARS = 200

app = typer.Typer(no_args_is_help=True, help="Import, export and list feedback.")


@app.command("export")
def export_file(
    path: Annotated[Path, typer.Argument(help="File to write")],
    format: Annotated[Literal["trl", "openai"], typer.Option(help="Row format")] = "trl",
    url: URL_OPTION = "http://127.0.0.1:8000",
) -> None:
    """Write all preference pairs as JSONL."""
    download(url, "/v1/feedback/export", {"format": format}, path)
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
    """Rows per second, accepted, duplicates and rejected; and messages above the bar, which stay."""

    def __init__(self, is_shown: bool = True) -> None:
        self._console = Console(stderr=True)
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[counts]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not is_shown,
        )
        self._rows_before = 0

    def start(self, source: Source, progress: Progress) -> None:
        """Show the bar."""
        self._rows_before = progress.tally.num_rows
        self._bar.add_task(source.label[-40:], total=source.total, counts="")
        self._bar.start()

    def settled(self, progress: Progress, done: int) -> None:
        """A batch is settled; reading is `done` of the source's total far."""
        [task] = self._bar.tasks
        tally = progress.tally
        rate = f"{(tally.num_rows - self._rows_before) / task.elapsed:,.0f} rows/s" if task.elapsed else ""
        counts = (
            f"{tally.num_rows:,} rows {rate}  accepted {tally.num_accepted:,}  "
            f"duplicates {tally.num_duplicates:,}  rejected {tally.num_rejected:,}"
        )
        self._bar.update(task.id, completed=done, counts=counts)

    def waits(self, reason: str, delay_s: float) -> None:
        """The server is away; the batch is sent again after the delay."""
        self.say(f"{reason}; trying again in {delay_s:.1f} s")

    def say(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(Text(f"mace: {message}", style="yellow"))

    def close(self) -> None:
        """Take the bar away, if it is shown."""
        if self._bar.live.is_started:
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
    try:
        for notice in replace_home(os.environ):  # progress, and the cache of data sets
            typer.secho(f"mace: {notice}", fg="yellow", err=True)
        with closing(ImportBar(is_shown=not as_json)) as bar, ExitStack() as stack:
            sink: Server | DryRun = DryRun()
            if not dry_run:
                sink = stack.enter_context(closing(Server(url, headers(), patience, bar.waits)))
                sink.check()
            opened = open_source(source, split, config, streaming)
            file = None if dry_run else ProgressFile(opened.identity, url.rstrip("/"), f"chat={chat}")
            importer = Importer(
                opened,
                sink,
                chat=chat,
                limit=limit,
                rejected=rejected,
                progress_file=file,
                on_settled=bar.settled,
            )
            num_before = _run(importer, restart, bar)
    except (SourceError, DeliveryError, ConfigError) as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or 'import'}: {error.strerror or error}")
    tally = importer.progress.tally
    report = _report(tally, tally.num_rows - num_before, started_s, dry_run)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report, tally, rejected)
    if report["rows"] and report["rejected"] == report["rows"]:
        raise typer.Exit(1)


def _run(importer: Importer, restart: bool, bar: ImportBar) -> int:
    """Import; returns the rows that earlier runs had settled."""
    file = importer.progress_file
    if file and restart:
        file.remove()
    had_progress = file is not None and file.load() is not None
    if importer.resume():
        bar.say(f"going on behind row {importer.progress.next_after:,}; --restart begins at the first row")
    elif had_progress:
        bar.say("the server does not know what an earlier run sent to it: beginning at the first row")
    num_before = importer.progress.tally.num_rows
    bar.start(importer.source, importer.progress)
    try:
        importer.run()
    except (KeyboardInterrupt, SourceError, DeliveryError, OSError) as error:
        bar.close()
        is_interrupted = isinstance(error, KeyboardInterrupt)
        message = (
            f"mace: {'interrupted' if is_interrupted else 'stopped'} behind row {importer.progress.next_after:,}"
        )
        if file is not None:
            message += ", up to there everything is committed or refused; the same command goes on from there"
        typer.secho(message, fg="yellow", err=True)
        if is_interrupted:
            raise typer.Exit(_INTERRUPTED) from None
        raise
    return num_before


def _report(tally: Tally, num_new: int, started_s: float, dry_run: bool) -> dict[str, Any]:
    elapsed_s = time.monotonic() - started_s
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


def _by_count(tally: Tally) -> list[Reason]:
    return sorted(tally.reasons.values(), key=lambda reason: (-reason.count, reason.first_row))


def _show(report: dict[str, Any], tally: Tally, rejected: Path | None) -> None:
    console = Console(highlight=False)
    stored = f"{report['accepted']:,} accepted, {report['duplicates']:,} duplicates"
    taken = f"{report['accepted']:,} usable" if report["dry_run"] else stored
    formats = ", ".join(f"{count:,} {name}" for name, count in tally.formats.most_common())
    console.print(
        f"{report['rows']:,} rows: {taken}, {report['rejected']:,} rejected ({report['rows_per_s']:,} rows/s)"
    )
    if formats:
        console.print(f"formats: {formats}")
    if tally.dropped_columns:
        console.print(f"columns not taken: {', '.join(sorted(tally.dropped_columns))}", markup=False)
    if not tally.reasons:
        return
    table = Table("rows", "first", "column", "reason")
    for reason in _by_count(tally)[:_SHOWN_REASONS]:
        text = (
            reason.example if len(reason.example) <= _REASON_CHARS else reason.example[: _REASON_CHARS - 1] + "…"
        )
        # The text of a row is not markup.
        table.add_row(f"{reason.count:,}", f"{reason.first_row:,}", Text(reason.param or ""), Text(text))
    console.print(table)
    if len(tally.reasons) > _SHOWN_REASONS:
        console.print(f"... and {len(tally.reasons) - _SHOWN_REASONS} more reasons")
    where = f"refused rows are in {rejected}" if rejected else "--rejected FILE writes the refused rows"
    console.print(where, markup=False)
