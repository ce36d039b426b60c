"""`mace demo`: prefer one taste after the other on a running server, and see it follow."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from app.commands.connection import URL_OPTION, api_key, fail
from core.errors import ConfigError

app = typer.Typer(invoke_without_command=True)
"""`mace demo` by itself is the demo below; packages above `app` add sub-commands (`app.cli`)."""


@app.callback()
def demo(
    context: typer.Context,
    url: URL_OPTION = "http://127.0.0.1:8000",
    taste: Annotated[list[str] | None, typer.Option(help="Taste to prefer; again for the next one")] = None,
    preferences: Annotated[int, typer.Option(min=1, help="Preferences to post for each taste")] = 60,
    samples: Annotated[int, typer.Option(min=1, help="Answers to sample for each held-out question")] = 4,
    guard: Annotated[bool, typer.Option(help="Measure what else the model can (SmolLM2; some minutes)")] = True,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for each lesson")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what was learnt, and when, to this PNG or SVG file")
    ] = None,
) -> None:
    """Teach a built-in model one taste after the other, while a background client measures TTFT and TBT."""
    if context.invoked_subcommand is not None:
        return
    from openai import APIConnectionError, OpenAIError

    from app.demo.plot import write_plot
    from app.demo.run import DemoOptions, run_demo
    from app.demo.taste import DemoError

    options = DemoOptions(
        url,
        tuple(taste or ()),
        preferences,
        samples=samples,
        timeout_s=timeout_s,
        guard=guard,
        api_key=api_key(),
    )
    console = Console(stderr=as_json)
    try:
        report = asyncio.run(run_demo(options, lambda line: console.print(line, highlight=False)))
    except APIConnectionError:
        fail(f"no server at {url}; start one with `make serve`, or `mace serve serve_config.tiny.yaml`")
    except (OpenAIError, DemoError) as error:
        fail(error)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report, console)
    if plot is not None:
        try:
            write_plot(report, plot)
        except ConfigError as error:
            fail(error)


def _show(report: dict[str, Any], console: Console) -> None:
    headings = ("preferred", "share before", "after", "right before", "after", "live version", "learnt in")
    table = _table(f"What {report['phases'][0]['preferences']} preferences did", headings)
    start = report["abilities"]
    for phase in report["phases"]:
        right = [phase["before"]["right"], phase["after"]["right"]]
        if "abilities" in phase:
            right = [start["right"], phase["abilities"]["right"]]
            start = phase["abilities"]
        table.add_row(
            phase["taste"],
            f"{phase['share_before']:.0%}",
            f"{phase['share_after']:.0%}",
            *("-" if share is None else f"{share:.1%}" for share in right),
            f"{phase['live_before']} -> {phase['live_after']}",
            f"{phase['learnt_after_s']:.0f} s",
        )
    console.print(table)
    if report["examples"]:
        examples = Table("question", "before", "after", title="The likeliest answers", show_lines=True)
        for example in report["examples"]:
            examples.add_row(example["question"], example["before"], example["after"])
        console.print(examples)
    of_client = ("", "requests", "failed", "TTFT p50", "p99", "TBT p50", "p99", "max")
    latency = _table("Background client (ms)", of_client)
    rows = {"not learning": report["without_learning"]}
    rows |= {f"learning {phase['taste']}": phase["while_learning"] for phase in report["phases"]}
    for name, timings in rows.items():
        ttft, tbt = timings["ttft_ms"], timings["tbt_ms"]
        cells = [
            timings["requests"],
            timings["failed"],
            ttft["p50"],
            ttft["p99"],
            tbt["p50"],
            tbt["p99"],
            tbt["max"],
        ]
        latency.add_row(name, *map(str, cells))
    console.print(latency)


def _table(title: str, headings: Sequence[str]) -> Table:
    return Table(*(Column(heading, justify="right") for heading in headings), title=title)
