"""A `mace serve` of our own: in a directory, on a port and in a Ray of its own; its processes by descent; its end.

The only place that sends signals to a server. What is killed must descend from the server process at that very moment;
a process that merely has a fitting title is left alone.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from app.commands.processes import become_subreaper, is_alive
from core.config import AppArgs
from core.errors import MaceError

_START_S = 400.0
_PROFILE_S = 600.0
_PROBE_S = 0.25
_STOP_S = 90.0
_GRACE_S = 5.0
_GONE_S = 10.0
_TAIL_CHARS = 3000
ROLES = (
    ("VLLM::EngineCore", "engine core"),
    ("VLLM::Worker", "worker"),
    (":Executor", "executor"),
    (":Control", "control"),
    ("CentralScheduler", "control"),
    ("DriftMonitor", "control"),
    ("ServeController", "serve controller"),
    ("ProxyActor", "proxy"),
    ("raylet/raylet", "raylet and gcs"),
    ("gcs_server", "raylet and gcs"),
    ("ray/dashboard", "dashboard and agents"),
    ("ray.dashboard", "dashboard and agents"),
    ("ray-dashboard", "dashboard and agents"),
    ("DashboardAgent", "dashboard and agents"),
    ("RuntimeEnvAgent", "dashboard and agents"),
    ("log_monitor", "dashboard and agents"),
    ("api_server", "executor"),
    ("/mace serve", "mace serve"),
)
"""A part of a command line, and the role in the report; the first that fits. Plain vLLM's front end stands in the line
of our executor."""

_SPAWNED = "multiprocessing.spawn import spawn_main"
_WARM = "multiprocessing.forkserver import main"


class ServerError(MaceError):
    """The server does not do what the run needs, or a rule of this module would be broken."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free when asked; another process may still take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_servers() -> None:
    """Make this process the one that ends its servers: orphans come to it, and SIGTERM acts like Ctrl-C."""
    become_subreaper()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


class ServerProcess:
    """One server at a time: `start` (or `launch`), `kill` processes of it, `end`, and `start` again.

    Call `own_servers` first: then what a killed server leaves behind becomes our child, and `end` finds it.

    Args:
        directory: where config, log and state go; must exist.
        config: the Serve config to start from; host, port and `state_dir` are replaced.
        sections: settings by section, merged over those of the config.
        deployments: Serve's options by deployment; None keeps those of the config.
        models: directory of built models, linked into the state directory; None builds them there when needed.
        ray_dir: for Ray's files; None is Ray's default. The path must be short: there will be sockets below.
        port: of HTTP; None takes a free one.
        command: what is started, with the config's path as last argument; None is `mace serve` of this environment.
        ready_path: what answers 200 once the server serves.

    Raises:
        pydantic.ValidationError: a setting is wrong; it shows here and not in the server's log.
    """

    def __init__(
        self,
        directory: Path,
        config: Path,
        *,
        sections: Mapping[str, Mapping[str, Any]] | None = None,
        deployments: Sequence[Mapping[str, Any]] | None = None,
        models: Path | None = None,
        ray_dir: Path | None = None,
        port: int | None = None,
        command: Sequence[str | Path] | None = None,
        ready_path: str = "/ready",
    ) -> None:
        port = port or free_port()
        self.directory = directory
        self.state_dir = directory / "state"
        self.url = f"http://127.0.0.1:{port}"
        self.log = directory / "serve.log"
        self._config = directory / "serve_config.yaml"
        self._ray_dir = ray_dir
        self._command = command or (Path(sys.executable).with_name("mace"), "serve")
        self._ready_path = ready_path
        self._strangers = set(psutil.Process().children(recursive=True))
        self._root: psutil.Popen | None = None
        document = yaml.safe_load(config.read_text(encoding="utf-8"))
        document["http_options"] = {**document.get("http_options", {}), "host": "127.0.0.1", "port": port}
        application = document["applications"][0]
        self.args: dict[str, Any] = {**application.get("args", {}), "state_dir": str(self.state_dir)}
        """The application's settings, as in the config file."""
        self.args |= {
            name: {**(self.args.get(name) or {}), **section} for name, section in (sections or {}).items()
        }
        AppArgs.model_validate(self.args)
        application["args"] = self.args
        if deployments is not None:
            application["deployments"] = [dict(options) for options in deployments]
        self._config.write_text(yaml.safe_dump(document), encoding="utf-8")
        self.state_dir.mkdir(exist_ok=True)
        if models is not None and not (self.state_dir / "models").exists():
            (self.state_dir / "models").symlink_to(models.absolute())

    def launch(self) -> None:
        """Start the command, and do not wait until it serves. ServerError if processes of the last one are there."""
        if self.family():
            raise ServerError("the last server must be ended before another is started")
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # not another's
        if self._ray_dir is not None:
            environment["RAY_TMPDIR"] = str(self._ray_dir)
        with self.log.open("ab") as log:
            self._root = psutil.Popen(
                [*self._command, self._config],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us, and we end the server
            )

    async def start(self) -> None:
        """`launch` the server and `wait_until_ready`."""
        self.launch()
        await self.wait_until_ready()

    async def wait_until_ready(self) -> None:
        """Wait until `/ready` says so. ServerError, with the end of the log, if the server ends or takes too long."""
        give_up_s = time.monotonic() + _START_S
        while not await asyncio.to_thread(self.is_ready):
            if self.has_exited or time.monotonic() > give_up_s:
                raise ServerError(f"the server did not start:\n{self.log_tail()}")
            await asyncio.sleep(_PROBE_S)

    def wait_for_profile(self) -> None:
        """Wait for the profile that a first start measures while nobody asks, so that no measurement pays for it.

        Raises:
            ServerError: it is not there after ten minutes.
        """
        give_up_s = time.monotonic() + _PROFILE_S
        while not any(self.state_dir.glob("profiles/*/*.json")):
            if time.monotonic() > give_up_s:
                raise ServerError(f"the profile of the first start was not there after {_PROFILE_S:.0f} s")
            time.sleep(1)

    def is_ready(self) -> bool:
        """Ask `ready_path`; False also if nobody answers."""
        try:
            return self.call("GET", self._ready_path, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """`start` the server before the block, and end it after that, whatever happens."""
        with self.ended_after():
            asyncio.run(self.start())
            yield
            self.end()

    @contextlib.contextmanager
    def ended_after(self) -> Iterator[None]:
        """Nothing of the server is left after the block, whatever happens; a second Ctrl-C does not keep us from it."""
        try:
            yield
        finally:
            old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                self.end(None)
            finally:
                for number, handler in old.items():
                    signal.signal(number, handler)

    def call(self, method: str, path: str, *, timeout: float = 60.0, **options: Any) -> httpx.Response:
        """Send an HTTP request, with the options of `httpx.request`; the timeout is in seconds."""
        return httpx.request(method, self.url + path, timeout=timeout, **options)

    @property
    def root(self) -> psutil.Process:
        """The `mace serve` process, which may have ended. ServerError if nothing was launched."""
        if self._root is None:
            raise ServerError("no server was launched")
        return self._root

    @property
    def has_exited(self) -> bool:
        """True once the `mace serve` process is gone, and before it is launched."""
        return self._root is None or self._root.poll() is not None

    def members(self) -> list[psutil.Process]:
        """The `mace serve` process and what descends from it now."""
        if self.has_exited:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.root, *self.root.children(recursive=True)]
        return []

    def find(self, part: str, but: psutil.Process | None = None) -> psutil.Process | None:
        """The member whose command line holds `part`, if there is one (other than `but`)."""
        found = (one for one in self.members() if one != but and part in title_of(one) and is_alive(one))
        return next(found, None)

    def kill(self, victim: psutil.Process) -> None:
        """Send SIGKILL. ServerError if it is no process of our server (any more)."""
        if victim not in self.members():
            raise ServerError(f"process {victim.pid} does not descend from our server; it was not killed")
        victim.kill()

    def family(self) -> list[psutil.Process]:
        """Members, and orphans of a killed server, which became our children; reaps those that have ended."""
        family = [p for p in psutil.Process().children(recursive=True) if p not in self._strangers]
        for process in family:
            if process != self._root and not is_alive(process):
                with contextlib.suppress(ChildProcessError):  # a zombie further down is its parent's
                    os.waitpid(process.pid, os.WNOHANG)
        return [process for process in family if is_alive(process)]

    def end(self, by: signal.Signals | None = signal.SIGTERM) -> int:
        """End everything that came of the server, by this signal first; None kills at once.

        Returns:
            How many processes outlived the signal and had to be killed.

        Raises:
            ServerError: some cannot be killed.
        """
        family = self.family()
        if by is not None and not self.has_exited:
            self.root.send_signal(by)
            with contextlib.suppress(psutil.TimeoutExpired):
                self.root.wait(_STOP_S)
            psutil.wait_procs({*family, *self.family()}, timeout=_GRACE_S)
        killed: set[psutil.Process] = set()
        give_up_s = time.monotonic() + _GONE_S
        while left := {process for process in (*family, *self.family()) if is_alive(process)}:
            if time.monotonic() > give_up_s:
                raise ServerError(f"processes that cannot be ended: {sorted(process.pid for process in left)}")
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            killed |= left
            time.sleep(0.1)
        if not self.has_exited:
            self.root.wait(_GONE_S)
        return len(killed)

    def log_tail(self) -> str:
        """The end of what the server printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARS:] if self.log.exists() else ""


def title_of(process: psutil.Process) -> str:
    """Command line of a process; empty if it has ended.

    vLLM's processes now and then fail to set their titles (setproctitle says nothing): then they are named by descent.
    """
    try:
        title = " ".join(process.cmdline()).strip()
        owner = process.parent()
        parent = " ".join(owner.cmdline()) if owner is not None else ""
    except psutil.Error:
        return ""
    if _WARM in title:  # on CPU EngineCore is forked from the warm process, and the worker from EngineCore
        named = {title: "VLLM::EngineCore", "VLLM::EngineCore": "VLLM::Worker"}
        return title if owner is None or "ServeReplica" in parent else named.get(title_of(owner), title)
    if "VLLM::EngineCore" in title and "VLLM::EngineCore" in parent:
        return "VLLM::Worker"
    if _SPAWNED not in title:
        return title
    if "ServeReplica" in parent:
        return "VLLM::EngineCore"
    return "VLLM::Worker" if _SPAWNED in parent or "VLLM::EngineCore" in parent else title


def role_of(title: str) -> str:
    """The role of a process by its command line; `other` if it is none that is known."""
    return next((role for part, role in ROLES if part in title), "other")


def cpu_seconds(processes: Iterable[psutil.Process]) -> dict[psutil.Process, float]:
    """User and system time of each process so far; those that have ended are left out."""
    times = {}
    for process in processes:
        try:
            spent = process.cpu_times()
        except psutil.Error:
            continue
        times[process] = spent.user + spent.system
    return times


def cores_by_role(
    before: Mapping[psutil.Process, float], after: Mapping[psutil.Process, float], elapsed_s: float
) -> dict[str, float]:
    """Cores that the processes of each role took between two readings of `cpu_seconds`, so many seconds apart."""
    cores: dict[str, float] = {}
    for process, spent_s in after.items():
        role = role_of(title_of(process))
        cores[role] = cores.get(role, 0.0) + (spent_s - before.get(process, 0.0)) / elapsed_s
    return cores


def plain_server(
    directory: Path, config: Path, model_dir: Path, options: Mapping[str, Any] | None = None
) -> ServerProcess:
    """vLLM's own server on the model of a config of ours: as many seats and tokens, and LoRA, eager as ours.

    Args:
        directory: where its files go; must exist.
        config: our Serve config.
        model_dir: of the model.
        options: vLLM's arguments that differ, by name; False leaves a switch out.
    """
    from engine.vllm.compat import make_engine_args, worker_binding

    args = AppArgs.model_validate(yaml.safe_load(config.read_text(encoding="utf-8"))["applications"][0]["args"])
    ours = make_engine_args(args, str(model_dir))
    port = free_port()
    settings = {
        "model": str(model_dir),
        "served-model-name": args.model.model_id,
        "host": "127.0.0.1",
        "port": port,
        "dtype": ours.dtype,
        "max-model-len": ours.max_model_len,
        "max-num-seqs": ours.max_num_seqs,
        "max-num-batched-tokens": ours.max_num_batched_tokens,
        "kv-cache-memory-bytes": ours.kv_cache_memory_bytes or 256 << 20,
        "enforce-eager": True,
        "enable-lora": True,
        "max-lora-rank": ours.max_lora_rank,
        "max-loras": ours.max_loras,
        **(options or {}),
    }
    path = directory / "plain.yaml"
    left = {name: value for name, value in settings.items() if value not in (None, False)}
    path.write_text(yaml.safe_dump(left), encoding="utf-8")
    # The harness ends the command with the path of its own config, which the shell drops.
    binding = f"VLLM_CPU_OMP_THREADS_BIND={worker_binding(args, model_dir)}"
    start = f"{binding} exec {sys.executable} -m vllm.entrypoints.launchers.api_server.entry --config {path}"
    return ServerProcess(
        directory, config, port=port, command=("/bin/sh", "-c", start, "sh"), ready_path="/health"
    )
