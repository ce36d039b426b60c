"""`mace feedback`: import, export and list."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from app.commands.connection import URL_OPTION, call, download
from app.commands.feedback_import import import_feedback

app = typer.Typer(no_args_is_help=True, help="Import, export and list feedback.")


class Format(StrEnum):
    """Export formats."""

    TRL = "trl"
    OPENAI = "openai"


app.command("import")(import_feedback)


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
