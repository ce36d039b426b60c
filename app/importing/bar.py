"""The progress bar of an import, on standard error."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from app.importing import progress_file
from app.importing.source import Source


class ImportBar:
    """Rows per second, accepted, duplicates and rejected; and messages above the bar."""

    def __init__(self, console: Console, is_shown: bool = True) -> None:
        self._console = console
        self._bar = Progress(
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

    def start(self, source: Source, progress: progress_file.Progress) -> None:
        """Show the bar."""
        self._rows_before = progress.tally.num_rows
        self._task = self._bar.add_task(source.label[-40:], total=source.total, counts="")
        self._bar.start()

    def settled(self, progress: progress_file.Progress, done: int) -> None:
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
