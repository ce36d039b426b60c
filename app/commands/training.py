"""`mace training`: what is being learnt now; pause and resume."""

import json
from typing import Annotated

import typer

from app.commands.connection import URL_OPTION, call


def training(
    action: Annotated[str, typer.Argument(help="show, pause or resume")] = "show",
    url: URL_OPTION = "http://127.0.0.1:8000",
) -> None:
    """Show training as JSON, or pause or resume it."""
    if action not in ("show", "pause", "resume"):
        raise typer.BadParameter("show, pause or resume")
    if action != "show":
        call(url, "POST", f"/v1/training/{action}")
    typer.echo(json.dumps(call(url, "GET", "/v1/training").json(), indent=2))
