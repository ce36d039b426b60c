"""`mace adapters`: the lineage, and rolling back or forward."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.commands.connection import URL_OPTION, call


def adapters(
    activate: Annotated[str | None, typer.Option(help="Make this version (or `base`) live")] = None,
    url: URL_OPTION = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """List adapter versions, or make one live."""
    if activate is not None:
        call(url, "POST", f"/v1/adapters/{activate}/activate")
    listing = call(url, "GET", "/v1/adapters").json()
    if as_json:
        typer.echo(json.dumps(listing, indent=2))
        return
    table = Table()
    for heading in ("version", "live", "status", "parent", "pairs", "steps", "accuracy", "margin"):
        table.add_column(heading, no_wrap=True)
    table.add_column("reason", overflow="fold")
    for row in listing["data"]:
        table.add_row(*_cells(row))
    Console().print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    metrics = row.get("metrics", {})
    return [
        row["version"],
        "*" if row["live"] else "",
        row["status"],
        row.get("parent") or "base",
        str(row.get("num_pairs", "")),
        str(row.get("optimizer_steps", "")),
        _number(metrics.get("candidate_accuracy")),
        _number(metrics.get("candidate_margin")),
        "" if row["status"] == "published" else row.get("reason", ""),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
