"""What the `mace profile` commands share: their settings, and how errors end them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from core.config import AppArgs
from core.errors import ConfigError, MaceError

CONFIG_OPTION = Annotated[Path, typer.Option(help="Ray Serve config file; its args decide model and engine")]
JSON_OPTION = Annotated[bool, typer.Option("--json", help="Print JSON")]


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """One line instead of a traceback; exit code 2 for wrong settings, 1 for what went wrong later."""
    try:
        yield
    except MaceError as error:
        typer.secho(f"mace: {error}", fg="red", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


def read_args(config: Path, model: str | None, state_dir: Path | None) -> AppArgs:
    """The `args:` of the config's application, with the options of the command line on top.

    Raises:
        ConfigError: the file is unreadable or the settings are wrong.
    """
    from app.main import parse_args

    try:
        document = yaml.safe_load(config.read_text(encoding="utf-8"))
        args: dict[str, Any] = dict(document["applications"][0].get("args") or {})
    except OSError as error:
        raise ConfigError(f"cannot read {config}: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"{config} is not a Serve config: {error}") from error
    if model is not None:
        args["model"] = {"model_id": Path(model).name.replace(":", "-"), "model_source": model}
    if state_dir is not None:
        args["state_dir"] = str(state_dir)
    return parse_args(args)
