"""Talking to a running server from the command line."""

import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
import yaml

from app.importing.delivery import message_of
from core.errors import ConfigError

URL_OPTION = Annotated[str, typer.Option(envvar="MACE_URL", help="Address of the running server")]

_TIMEOUT_S = 120.0


def api_key() -> str:
    """The key that the server asks for (`engine.frontend_kwargs.api_key`): MACE_API_KEY, or any if it asks for none."""
    return os.environ.get("MACE_API_KEY", "none")


def fail(message: object, code: int = 1) -> NoReturn:
    """End the command with a message."""
    typer.secho(f"mace: {message}", fg="red", err=True)
    raise typer.Exit(code)


def read_config(path: Path) -> dict[str, Any]:
    """The Ray Serve config file as it stands; a ConfigError if it is unreadable or has no application."""
    try:
        document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        dict(document["applications"][0])
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (LookupError, TypeError) as error:
        raise ConfigError(f"{path} is not a Serve config: it has no application") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not a Serve config: {error}") from error
    return document


def call(url: str, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """One request; connection failures and error replies end the command with a message."""
    address = f"{url.rstrip('/')}{path}"
    try:
        response = httpx.request(method, address, timeout=_TIMEOUT_S, headers=headers(), **kwargs)
    except httpx.TransportError as error:
        fail(f"no server at {url} ({error}); start one with `make serve`")
    if response.is_error:
        fail(message_of(response))
    return response


def download(url: str, path: str, params: dict[str, str], target: Path) -> None:
    """Stream a response into a file; failures end the command with a message and leave no file."""
    address = f"{url.rstrip('/')}{path}"
    try:
        with httpx.stream("GET", address, params=params, headers=headers(), timeout=None) as reply:
            if reply.is_error:
                reply.read()
                fail(message_of(reply))
            with target.open("wb") as file:
                for chunk in reply.iter_bytes():
                    file.write(chunk)
    except httpx.TransportError as error:
        target.unlink(missing_ok=True)
        fail(f"the download from {url} broke off: {error}")


def headers() -> dict[str, str]:
    """The headers of every request to the server."""
    return {"Authorization": f"Bearer {api_key()}"}
