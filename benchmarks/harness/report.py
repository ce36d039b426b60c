"""How a study reports: options that all of them have, JSON or tables, and the texts of numbers in tables.

A report is one object of built-in types; tables and pictures are made of it, so a recorded report can be shown again.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from core.errors import ConfigError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables; progress goes to stderr")]
Out = Annotated[Path | None, typer.Option(help="Also write the JSON to this file")]
StateDir = Annotated[Path, typer.Option(help="Where the built-in model is or will be")]

Column = tuple[str, Any, Callable[[Any], str]]
"""Heading, key of a row, and the text of its value. A value is None or missing where there is nothing to say."""

_MAX_WIDTH = 400
"""Characters that a table may be wide."""
_TEXT_COLUMNS = 6
VERDICTS = {True: "met", False: "missed", None: "not applicable"}


def note(line: str) -> None:
    """Tell progress, on stderr."""
    typer.echo(line, err=True)


def show(report: Any, tables: Iterable[Table | str], as_json: bool, out: Path | None = None) -> None:
    """Print the report or its tables, and write the file that was asked for.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = json.dumps(report, indent=2)
    if out is not None:
        try:
            out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {out}: {error}") from error
    if as_json:
        typer.echo(text)
        return
    console = Console()
    for table in tables:
        width = console.width
        if isinstance(table, Table) and len(table.columns) > _TEXT_COLUMNS:
            # Many short cells would be cut in a terminal; those with text are wrapped.
            wide = console.options.update(max_width=_MAX_WIDTH)
            width = max(width, Measurement.get(console, wide, table).maximum)
        Console(width=width).print(table)


def table_of(title: str | None, rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> Table:
    """One line for each row; columns that no row has a value for are left out."""
    known = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    table = Table(*(heading for heading, _, _ in known), title=title)
    for row in rows:
        table.add_row(*("-" if (value := row.get(key)) is None else text(value) for _, key, text in known))
    return table


def checks_table(title: str, checks: Iterable[dict[str, Any]]) -> Table:
    """Verdicts on `check`s: what is checked, its `value`, its bound or interval, and whether it `passed`."""
    table = Table("verdict", "check", "value", title=f"Checks: {title}")
    for check in checks:
        value = check["value"]
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        if None not in (interval := check.get("interval") or [None]):
            text += " ({:.3g} to {:.3g})".format(*interval)
        for key in ("at_least", "at_most"):
            text += f" ({key.replace('_', ' ')} {check[key]})" if key in check else ""
        table.add_row(VERDICTS[check["passed"]], check["check"], text)
    return table


def ms(seconds: float) -> str:
    """Text of a latency."""
    return f"{1e3 * seconds:.0f} ms"


def percent(share: float) -> str:
    """Text of a share."""
    return f"{100 * share:.1f} %"


def digits(number: int) -> Callable[[float], str]:
    """Text of a number with so many decimals."""
    return lambda value: f"{value:.{number}f}"


def interval_of(key: str, number: int = 2, factor: float = 1.0) -> Callable[[dict[str, Any]], str]:
    """Text of an estimate: its value under `key` and, if there are any, its bounds `low` and `high`."""

    def text(found: dict[str, Any]) -> str:
        low, value, high = (
            None if found[name] is None else f"{factor * found[name]:.{number}f}" for name in ("low", key, "high")
        )
        return f"{value}" if low is None else f"{value} ({low} to {high})"

    return text


SERVED: tuple[Column, ...] = (
    ("attainment", "pooled_slo_attainment", digits(3)),
    ("TTFT p50", "ttft_p50_s", ms),
    ("TTFT p99", "ttft_p99_s", ms),
    ("TBT p50", "tbt_p50_s", ms),
    ("TBT p99", "tbt_p99_s", ms),
    ("pairs/s", "pairs_per_s", digits(2)),
)
"""Columns of what requests and training got, from `results.summary_row`."""

JOULES: tuple[Column, ...] = (
    ("J/1,000 tokens", "joules_per_1000_tokens", digits(1)),
    ("J/pair", "joules_per_pair", digits(1)),
)
"""Columns of what it took, left out without a sensor."""
