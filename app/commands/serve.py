"""`mace serve`: the application of serve_config.yaml on a Ray of its own, until Ctrl-C or SIGTERM.

The same as `serve run serve_config.yaml`, plus: host and settings are checked before anything starts, the built-in
model is built with a progress bar, a failed start ends with the reason instead of hanging, and nothing is left behind.

With `RAY_ADDRESS` it joins that cluster. What was there before stays: other applications, Serve and Ray itself.
"""

import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import psutil
import typer

from app.commands.connection import fail, read_config
from app.commands.device import gpu_code_problem
from app.commands.host import prepare_host
from app.commands.processes import (
    ENDING_SIGNALS,
    become_subreaper,
    end_descendants,
    is_alive,
    own_children,
    run_apart,
)
from core.config import AppArgs
from core.errors import ConfigError
from core.files import make_directory
from deployments.routing.prefix_names import CALLBACK, CALLBACK_VARIABLE

_OWN_LIMIT_S = 9.0
"""From the signal to the end of every process; `docker stop` kills after 10."""
_JOINED_LIMIT_S = 60.0
"""The same on somebody else's cluster, whose Serve ends our replicas."""
_CONNECT_LIMIT_S = 30.0
_LOOK_S = 0.2
_REQUESTS_LIMIT_S = 3.0
_RAY_LIMIT_S = 5.0
_GRACE_S = 2.0
_NOT_OPTIONS = frozenset({"name", "user_config"})
_HEAD_PROCESSES = frozenset({"gcs_server", "raylet"})
_RAY_SETTINGS = {
    "RAY_worker_niceness": "0",  # by default 15: all else of the machine would go before the engine
    "RAY_AUTH_MODE": "disabled",  # reachable from this machine only
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",
    # From proxy to replica by gRPC: half the CPU time of a chunk of a stream (docs/measurements/tax.md).
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # else 4 MiB for a whole answer
    # Loops that run all the time, for clusters of many nodes: ours has one (docs/measurements/idle.md).
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    "RAY_raylet_report_resources_period_milliseconds": "500",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "10000",
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_event_stats": "false",
    "RAY_task_events_report_interval_ms": "10000",
    "RAY_ray_events_report_interval_ms": "10000",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "30",
    "REPORTER_UPDATE_INTERVAL_MS": "15000",
    "METRICS_RECORD_INTERVAL_S": "15",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "30",
    "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "2",
}
"""Environment of a Ray of our own, where it says nothing else."""
_DIRECT_SETTINGS = {
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    # One event loop for HTTP and engine: a thread between them costs each chunk of a stream two wake-ups.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # No load balancer has to hear of an end first, and the port is free for the next replica at once.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_PORT_QUARANTINE_S": "0",
}
"""The same where one executor answers its clients itself (docs/measurements/tax.md)."""
_DEFAULT_PORT = 8000
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def serve(
    config: Annotated[Path, typer.Argument(help="Ray Serve config file")] = Path("serve_config.yaml"),
) -> None:
    """Serve the model and learn from feedback."""
    started_s = time.monotonic()
    address = os.environ.get("RAY_ADDRESS") or "local"
    run_apart(_OWN_LIMIT_S if address == "local" else _JOINED_LIMIT_S)
    become_subreaper()
    _raise_on_signals()
    try:
        for notice in prepare_host():
            typer.secho(f"mace: {notice}", fg="yellow", err=True)
        document = _read(config)
        if address == "local":
            check_port(document.get("http_options", {}))
        else:
            _check_head(address)
        server = _Server(document, _prepare(document["applications"][0]), address)
        try:
            url = server.start()
            took_s = time.monotonic() - started_s
            typer.secho(f"mace: ready at {url} after {took_s:.0f} s (Ctrl-C stops)", fg="green")
            server.wait_while_alive()
        finally:
            typer.echo("mace: stopping ...")
            server.stop()
    except ConfigError as error:
        fail(error, 2)
    except (_DeployError, _HeadDiedError) as error:
        typer.secho(f"mace: {error}", fg="red", err=True)
        os._exit(1)  # what Ray registered for the interpreter's exit would wait for its head
    except SystemExit:  # ours, or that of the handler that Ray sets while it starts
        os._exit(0)


class _StopRequested(SystemExit):
    """A signal came. No `Exception`: libraries that are interrupted by it must not take it for their own."""


class _HeadDiedError(Exception):
    """Ray's head ended under us."""


class _DeployError(Exception):
    """Ray or Serve gave up; the message is the reason."""


class _Server:
    """The application on Ray. `stop` ends what `start` has begun, as far as it came, and nothing else."""

    def __init__(self, document: dict[str, Any], args: AppArgs, address: str) -> None:
        self._document = document
        self._args = args
        self._address = address
        self._name: str = document["applications"][0].get("name", "mace")
        self._head: list[psutil.Process] = []
        """Processes of a head of our own."""
        self._owns_serve = False
        self._is_deployed = False
        """Our application is there, or on its way."""
        self._handle: Any = None
        self._direct_port: int | None = None
        """Where the one executor listens; None with a proxy between it and its clients."""

    @property
    def _owns_ray(self) -> bool:
        return self._address == "local"

    def start(self) -> str:
        """Start or join Ray and Serve, and deploy; returns the address that answers.

        Raises:
            _DeployError: one of them cannot.
        """
        application = self._document["applications"][0]
        overrides = {
            options["name"]: {key: value for key, value in options.items() if key not in _NOT_OPTIONS}
            for options in application.get("deployments", ())
        }
        if unknown := overrides.keys() - {"Executor", "Control"}:
            names = ", ".join(map(repr, unknown))
            raise _DeployError(f"deployments: there is no {names}, only Executor and Control")
        self._set_environment(overrides.get("Executor", {}))
        typer.echo("mace: starting Ray and the engine ...")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        from ray import serve as ray_serve
        from ray.serve.context import _get_global_client

        from app.main import bind_deployments

        self._start_ray()
        self._start_serve()
        _raise_on_signals()  # again: Ray has set handlers of its own
        self._is_deployed = True
        try:
            self._handle = ray_serve.run(
                bind_deployments(self._args, overrides),
                name=self._name,
                route_prefix=application.get("route_prefix", "/"),
                logging_config=self._document.get("logging_config"),
            )
        except Exception as error:
            raise _DeployError(f"the application did not start:\n{error}") from error
        return self._url(_get_global_client().http_config)

    def _set_environment(self, executor: dict[str, Any]) -> None:
        """What Ray and Serve read from the environment, for their processes and ours.

        One executor listens at the configured port itself, since Serve's proxy is only in the way of its clients: it
        listens elsewhere then. Several are behind the proxy, which knows who has a request's prefix.
        """
        settings: dict[str, str] = {}
        if self._owns_ray:
            settings |= _RAY_SETTINGS
            http = self._document.setdefault("http_options", {})
            is_alone = executor.get("num_replicas", 1) == 1 and not executor.get("autoscaling_config")
            if is_alone and self._document.get("proxy_location") != "Disabled":
                port = int(http.get("port", _DEFAULT_PORT))
                settings |= _DIRECT_SETTINGS | {
                    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
                    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),  # the first that is not in the range
                }
                self._direct_port = port
                http["port"] = _free_port(http.get("host"))
        if self._direct_port is None:
            settings[CALLBACK_VARIABLE] = CALLBACK
        for name, value in settings.items():
            os.environ.setdefault(name, value)

    def _start_ray(self) -> None:
        import ray

        try:
            with contextlib.nullcontext() if self._owns_ray else _limit(f"no Ray answers at {self._address}"):
                options = {"include_dashboard": self._args.ray_dashboard} if self._owns_ray else {}
                ray.init(self._address, log_to_driver=False, logging_level="WARNING", **options)
        except Exception as error:
            raise _DeployError(f"Ray did not start: {_first_line(error)}") from error
        self._head = own_children(_HEAD_PROCESSES) if self._owns_ray else []

    def _start_serve(self) -> None:
        import ray
        from ray import serve as ray_serve
        from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

        http = self._document.get("http_options", {})
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
        except ValueError:
            self._owns_serve = True
        if not self._owns_serve:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it warns that our options are not its own
            if self._name in ray_serve.status().applications:
                raise _DeployError(
                    f"the cluster already serves an application {self._name!r}: end that one "
                    f"(`serve delete {self._name}`), or give this one another applications.name"
                )
            return
        try:
            if _is_here(ray.get_runtime_context().gcs_address):
                check_port(http)
            ray_serve.start(
                http_options=http,
                proxy_location=self._document.get("proxy_location"),
                logging_config=self._document.get("logging_config"),
            )
        except Exception as error:
            raise _DeployError(f"Serve did not start: {_first_line(error)}") from error

    def _url(self, http: Any) -> str:
        """Where clients are answered; of a Serve that was there before, the config file does not know it."""
        import ray

        host = http.host or "127.0.0.1"
        if host in _WILDCARDS:
            head = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
            host = _WILDCARDS[host] if self._owns_ray or _is_here(f"{head}:0") else head
        prefix = self._document["applications"][0].get("route_prefix", "/").rstrip("/")
        return f"http://{bracketed(host)}:{self._direct_port or http.port}{http.root_path}{prefix}"

    def wait_while_alive(self) -> NoReturn:
        """Wait for a signal; Ray does not tell us that its head is dead, and without it nothing is served.

        Raises:
            _HeadDiedError: a process of the head has ended. With somebody else's cluster there is none to look at.
        """
        while True:
            if not self._head_lives():
                raise _HeadDiedError("Ray's head died; start again, nothing that was acknowledged is lost")
            time.sleep(1.0)

    def _head_lives(self) -> bool:
        return all(map(is_alive, self._head))

    def stop(self) -> None:
        """End requests with an error, then the engines, then what is ours of application, Serve and Ray."""
        with _silence():
            # In a thread, since calls of a Ray that is dying, because it got the signal too, may not return.
            leaving = threading.Thread(target=self._leave, daemon=True)
            leaving.start()
            leaving.join(_RAY_LIMIT_S if self._owns_ray else None)
            end_descendants(_GRACE_S)

    def _leave(self) -> None:
        import ray
        from ray import serve as ray_serve

        if not (ray.is_initialized() and self._head_lives()):
            return
        with contextlib.suppress(Exception):  # not deployed, or already gone
            if self._handle is not None:
                self._handle.broadcast("stop").results(timeout_s=_REQUESTS_LIMIT_S, return_exceptions=True)
        if not self._owns_ray:
            with contextlib.suppress(Exception):
                if self._owns_serve:
                    ray_serve.shutdown()
                elif self._is_deployed:
                    ray_serve.delete(self._name)
        if self._head_lives():
            ray.shutdown()


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


def check_port(http: dict[str, Any]) -> None:
    """Raise a ConfigError if we cannot listen: Serve's proxy would share a taken port, and get every other request."""
    host, port = http.get("host") or "127.0.0.1", int(http.get("port", _DEFAULT_PORT))
    where = f"{bracketed(host)}:{port}"
    if not 0 < port < 1 << 16:
        raise ConfigError(f"http_options.port: {port} is no port")
    try:
        with _probe(host) as probe:
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"{where} is taken; stop what listens there, or set http_options.port"
        else:
            text = f"cannot listen at {where} ({error.strerror or error}); set http_options.host and port"
        raise ConfigError(text) from error


def _free_port(host: str | None) -> int:
    host = host or "127.0.0.1"
    with _probe(host) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _probe(host: str) -> socket.socket:
    from ray._common.network_utils import is_ipv6

    probe = socket.socket(socket.AF_INET6 if is_ipv6(host) else socket.AF_INET)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return probe


def bracketed(host: str) -> str:
    """A host as a URL has it."""
    return f"[{host}]" if ":" in host else host


def _check_head(address: str) -> None:
    """Raise a ConfigError if nothing listens at a `RAY_ADDRESS`: Ray would try for minutes, deaf to signals."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # "auto" looks for a cluster on this machine, and says if there is none
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address}, where no Ray answers ({error.strerror or error}); "
            "start that cluster, or unset RAY_ADDRESS for a Ray of mace's own"
        ) from error


def _is_here(address: str) -> bool:
    """Is the host of `host:port` this machine?"""
    host = address.rpartition(":")[0].strip("[]")
    known = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return host in known | {"localhost", ""}


@contextlib.contextmanager
def _limit(complaint: str) -> Iterator[None]:
    """End the process on a signal, or with a complaint after `_CONNECT_LIMIT_S`, while the block is deaf to signals."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    is_over = threading.Event()
    with _silence() as terminal:

        def watch() -> None:
            give_up_s = time.monotonic() + _CONNECT_LIMIT_S
            while not is_over.is_set() and time.monotonic() < give_up_s:
                if signal.sigtimedwait(ENDING_SIGNALS, _LOOK_S) is not None:
                    os._exit(0)
            if not is_over.is_set():
                os.write(terminal, f"mace: {complaint} within {_CONNECT_LIMIT_S:.0f} s\n".encode())
                os._exit(1)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            is_over.set()
            watcher.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, old)


@contextlib.contextmanager
def _silence() -> Iterator[int]:
    """Discard what is printed as errors: Ray's threads complain of what ends before them. Yields the real stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield kept
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _prepare(application: dict[str, Any]) -> AppArgs:
    """Validate our settings, and make sure that torch runs here and the model is there, before Ray starts."""
    from app.main import parse_args
    from deployments.monitors.profiling import target_warnings, with_profile_path
    from engine.model_source import resolve_model

    args = parse_args(application.get("args", {}))
    if problem := gpu_code_problem():
        raise ConfigError(problem)
    try:
        _claim(args.state_dir)
        model_dir = resolve_model(args.model, args.state_dir, show_progress=sys.stderr.isatty())
    except OSError as error:
        raise ConfigError(
            f"{error.filename or args.state_dir} cannot be used: {error.strerror or error}"
        ) from error
    for warning in target_warnings(with_profile_path(args, model_dir)):
        typer.secho(f"mace: {warning}", fg="yellow", err=True)
    return args


def _claim(state_dir: Path) -> None:
    """Keep the state directory for this process until it ends: two servers would train every pair twice.

    Raises:
        ConfigError: another server has it, also after the time that one needs to stop.
    """
    make_directory(state_dir)
    lock = os.open(state_dir / ".serve.lock", os.O_CREAT | os.O_RDWR, 0o644)
    give_up_s = time.monotonic() + _OWN_LIMIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > give_up_s:
                raise ConfigError(
                    f"another `mace serve` uses {state_dir}; stop it, or set args.state_dir to another directory"
                ) from None
            time.sleep(_LOOK_S)


def _raise_on_signals() -> None:
    """From now on the first signal raises `_StopRequested`; further ones do not disturb the clean-up."""

    def stop(*_: object) -> None:
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise _StopRequested

    for number in ENDING_SIGNALS:
        signal.signal(number, stop)
