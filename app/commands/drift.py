"""`mace drift`: have preferences changed, and what does the server do about it?"""

import json
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from app.commands.connection import URL_OPTION, call


def drift(
    history: Annotated[int, typer.Option(min=0, max=1000, help="Newest events to show")] = 10,
    stream: Annotated[
        str | None, typer.Option(help="Only this stream: global, prompts, user:ID or tag:KEY=VALUE")
    ] = None,
    url: URL_OPTION = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Show drift: the level of alarm and why, the streams, and what was found."""
    params = {"limit": str(history)} | ({"stream": stream} if stream else {})
    state = call(url, "GET", "/v1/drift", params=params).json()
    if as_json:
        typer.echo(json.dumps(state, indent=2))
        return
    console = Console()
    console.print(Text(f"{'drifted' if state['drifted'] else 'no drift'}: {state['reason']}"))
    console.print(
        Text(
            f"level {state['level']:.2f}, retrain rate {state['retrain_rate']:.2f} slots a pair, "
            f"gamma factor {state['gamma_factor']:.2f}, {state['num_ignored']} scores ignored"
        )
    )
    console.print(_streams(state, stream))
    if state["history"]:
        console.print(_history(state["history"]))


def _streams(state: dict[str, Any], only: str | None) -> Table:
    table = _table("stream", "pairs", "accuracy", "margin", "loss", last="last event")
    for name, row in state["streams"].items():
        if only in (None, name):
            numbers = (_number(row[key]) for key in ("accuracy", "mean_margin", "mean_loss"))
            table.add_row(Text(name), str(row["num_pairs"]), *numbers, Text(_detail(row["last_event"])))
    prompts = state["prompts"]
    if only in (None, "prompts"):
        table.add_row("prompts", str(prompts["num_prompts"]), "", "", "", Text(_detail(prompts["last_event"])))
    return table


def _history(events: list[dict[str, Any]]) -> Table:
    table = _table("time", "stream", "what", last="detail")
    for event in events:
        at = datetime.fromtimestamp(event["at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(at, Text(event["stream"]), event["kind"], Text(event["detail"]))
    return table


def _table(*headings: str, last: str) -> Table:
    return Table(*(Column(heading, no_wrap=True) for heading in headings), Column(last, overflow="fold"))


def _detail(event: dict[str, Any] | None) -> str:
    return "" if event is None else event["detail"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
