"""`mace feedback`: import, export and list."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from app.commands.connection import URL_OPTION, call, download

app = typer.Typer(no_args_is_help=True, help="Import, export and list feedback.")

_LINES_PER_REQUEST = 500


class Format(StrEnum):
    """Export formats."""

    TRL = "trl"
    OPENAI = "openai"


@app.command("import")
def import_file(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL file, TRL or OpenAI DPO rows")],
    url: URL_OPTION = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Import preference pairs; repeating an interrupted import adds nothing twice."""
    lines = path.read_bytes().splitlines()
    accepted = duplicates = 0
    errors: list[dict[str, object]] = []
    for start in track(range(0, len(lines), _LINES_PER_REQUEST), description="importing", disable=as_json):
        body = b"\n".join(lines[start : start + _LINES_PER_REQUEST])
        part = call(url, "POST", "/v1/feedback/import", content=body).json()
        accepted += part["num_accepted"]
        duplicates += part["num_duplicates"]
        errors += [{**error, "line_number": error["line_number"] + start} for error in part["errors"]]
    report = {"accepted": accepted, "duplicates": duplicates, "errors": errors}
    typer.echo(json.dumps(report, indent=2))


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
