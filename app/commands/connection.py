"""Talking to a running server from the command line."""

from typing import Annotated, Any

import httpx
import typer

URL_OPTION = Annotated[str, typer.Option(envvar="MACE_URL", help="Address of the running server")]

_TIMEOUT_S = 120.0


def call(url: str, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """One request; connection failures and error replies end the command with a message."""
    try:
        response = httpx.request(method, f"{url.rstrip('/')}{path}", timeout=_TIMEOUT_S, **kwargs)
    except httpx.TransportError as error:
        typer.secho(f"mace: no server at {url} ({error}); start one with `make serve`", fg="red", err=True)
        raise typer.Exit(1) from error
    if response.is_error:
        typer.secho(f"mace: {_message(response)}", fg="red", err=True)
        raise typer.Exit(1)
    return response


def _message(response: httpx.Response) -> str:
    try:
        return f"{response.json()['error']['message']} (HTTP {response.status_code})"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"
