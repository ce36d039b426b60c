"""Talking to a running server from the command line."""

import os
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from app.importing.delivery import message_of

URL_OPTION = Annotated[str, typer.Option(envvar="MACE_URL", help="Address of the running server")]

_TIMEOUT_S = 120.0


def api_key() -> str:
    """The key that the server asks for (`engine.frontend_kwargs.api_key`): MACE_API_KEY, or any if it asks for none."""
    return os.environ.get("MACE_API_KEY", "none")


def call(url: str, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """One request; connection failures and error replies end the command with a message."""
    try:
        response = httpx.request(
            method, f"{url.rstrip('/')}{path}", timeout=_TIMEOUT_S, headers=_headers(), **kwargs
        )
    except httpx.TransportError as error:
        typer.secho(f"mace: no server at {url} ({error}); start one with `make serve`", fg="red", err=True)
        raise typer.Exit(1) from error
    if response.is_error:
        typer.secho(f"mace: {message_of(response)}", fg="red", err=True)
        raise typer.Exit(1)
    return response


def download(url: str, path: str, params: dict[str, str], target: Path) -> None:
    """Stream a response into a file; failures end the command with a message and leave no file."""
    try:
        with httpx.stream(
            "GET", f"{url.rstrip('/')}{path}", params=params, headers=_headers(), timeout=None
        ) as reply:
            if reply.is_error:
                reply.read()
                typer.secho(f"mace: {message_of(reply)}", fg="red", err=True)
                raise typer.Exit(1)
            with target.open("wb") as file:
                for chunk in reply.iter_bytes():
                    file.write(chunk)
    except httpx.TransportError as error:
        target.unlink(missing_ok=True)
        typer.secho(f"mace: the download from {url} broke off: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def _headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key()}"}
