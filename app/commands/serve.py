"""`mace serve`: the application of serve_config.yaml on a local Ray, until Ctrl-C or SIGTERM.

The same as `serve run serve_config.yaml`, plus: settings are checked before anything starts, the built-in model is
built with a progress bar, a failed start ends with the reason instead of hanging, and nothing is left behind.
"""

import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import psutil
import typer

from app.commands.connection import fail, read_config
from app.commands.processes import become_subreaper, end_descendants, own_children
from core.config import AppArgs
from core.errors import ConfigError
from deployments.routing.prefix_names import CALLBACK, CALLBACK_VARIABLE

_SHUTDOWN_GRACE_S = 10.0
_NOT_OPTIONS = frozenset({"name", "user_config"})
_HEAD_PROCESSES = frozenset({"gcs_server", "raylet"})


def serve(
    config: Annotated[Path, typer.Argument(help="Ray Serve config file")] = Path("serve_config.yaml"),
) -> None:
    """Serve the model and learn from feedback."""
    started_s = time.monotonic()
    try:
        document = _read(config)
        _check_port(document.get("http_options", {}))
        args = _prepare(document["applications"][0])
    except ConfigError as error:
        fail(error, 2)
    become_subreaper()
    _raise_on_signals()
    try:
        _run(document, args, started_s)
    except _DeployError as error:
        fail(f"the application did not start:\n{error}")
    except _HeadDiedError as error:
        typer.secho(f"mace: {error}", fg="red", err=True)
        end_descendants(_SHUTDOWN_GRACE_S)  # Ray's own shutdown would wait for its head
        os._exit(1)
    except _StopRequested:
        raise typer.Exit(0) from None
    finally:
        _shut_down()


class _StopRequested(Exception):
    """SIGINT or SIGTERM came."""


class _HeadDiedError(Exception):
    """Ray's head ended under us."""


class _DeployError(Exception):
    """Serve gave up on the application; the message is its reason."""


def _read(path: Path) -> dict[str, Any]:
    """The config file, checked against Serve's own schema.

    Raises:
        ConfigError: unreadable, no YAML, unknown to Serve, or not exactly one application.
    """
    from ray.serve.schema import ServeDeploySchema

    document = read_config(path)
    try:
        ServeDeploySchema.model_validate(document)
    except ValueError as error:
        raise ConfigError(f"{path} is not a Serve config: {error}") from error
    if len(document["applications"]) != 1:
        raise ConfigError(f"{path} must hold exactly one application, it has {len(document['applications'])}")
    return document


def _check_port(http: dict[str, Any]) -> None:
    """Raise a ConfigError if the port is taken: Serve's proxy would share it, and get every other request."""
    host, port = http.get("host", "127.0.0.1"), int(http.get("port", 8000))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be used ({error.strerror}); stop what listens there, or set http_options.port"
            ) from error


def _prepare(application: dict[str, Any]) -> AppArgs:
    """Validate our settings and make sure that the model is there, before Ray starts."""
    from app.main import parse_args
    from deployments.monitors.profiling import target_warnings, with_profile_path
    from engine.model_source import resolve_model

    args = parse_args(application.get("args", {}))
    model_dir = resolve_model(args.model, args.state_dir, show_progress=sys.stderr.isatty())
    for warning in target_warnings(with_profile_path(args, model_dir)):
        typer.secho(f"mace: {warning}", fg="yellow", err=True)
    return args


def _run(document: dict[str, Any], args: AppArgs, started_s: float) -> NoReturn:
    """Start everything and wait for a signal."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of our own, reachable from this machine only
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper", "true")
    os.environ.setdefault(CALLBACK_VARIABLE, CALLBACK)
    import ray
    from ray import serve as ray_serve

    from app.main import bind_deployments

    http = document.get("http_options", {})
    application = document["applications"][0]
    overrides = {
        options["name"]: {key: value for key, value in options.items() if key not in _NOT_OPTIONS}
        for options in application.get("deployments", ())
    }
    if unknown := overrides.keys() - {"Executor", "Control"}:
        raise _DeployError(f"deployments: there is no {', '.join(map(repr, unknown))}, only Executor and Control")
    typer.echo("mace: starting Ray and the engine ...")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False, logging_level="WARNING")
    head = own_children(_HEAD_PROCESSES)
    ray_serve.start(
        http_options=http,
        proxy_location=document.get("proxy_location"),
        logging_config=document.get("logging_config"),
    )
    _raise_on_signals()  # again: ray.init has set handlers of its own
    try:
        ray_serve.run(
            bind_deployments(args, overrides),
            name=application.get("name", "mace"),
            route_prefix=application.get("route_prefix", "/"),
        )
    except RuntimeError as error:
        raise _DeployError(str(error)) from error
    url = f"http://{http.get('host', '127.0.0.1')}:{http.get('port', 8000)}"
    typer.secho(f"mace: ready at {url} after {time.monotonic() - started_s:.0f} s (Ctrl-C stops)", fg="green")
    _wait_while_alive(head)


def _wait_while_alive(head: list[psutil.Process]) -> NoReturn:
    """Wait for a signal; Ray does not tell us that its head is dead, and without it nothing is served.

    Raises:
        _HeadDiedError: a process of the head has ended. With a cluster of someone else's there is none to look at.
    """
    while True:
        for process in head:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise _HeadDiedError("Ray's head died; start again, nothing that was acknowledged is lost")
        time.sleep(1.0)


def _raise_on_signals() -> None:
    """From now on the first SIGINT or SIGTERM raises `_StopRequested`; further ones do not disturb the clean-up."""

    def stop(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise _StopRequested

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _shut_down() -> None:
    import ray
    from ray import serve as ray_serve

    typer.echo("mace: stopping ...")
    if ray.is_initialized():
        ray_serve.shutdown()
        ray.shutdown()
    end_descendants(_SHUTDOWN_GRACE_S)
