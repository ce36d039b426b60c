"""The `mace serve` that chaos starts, in a directory and a Ray of its own, and the processes that come of it.

The only place that sends signals. What is killed must descend from the server process at that very moment; a process
that merely has a fitting title is left alone.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.harness.ports import free_port
from core.errors import MaceError

_STOP_S = 90.0
_GRACE_S = 5.0
_GONE_S = 10.0
_SPAWNED = "multiprocessing.spawn import spawn_main"


class ChaosError(MaceError):
    """The run cannot go on, or a rule of its own would be broken."""


class ServerProcess:
    """One server at a time: `launch`, `kill` processes of it, `end`, `launch` again.

    Make this process a subreaper first (`app.commands.processes.become_subreaper`): then what a killed server leaves
    behind becomes our child, and `end` finds it.

    Args:
        directory: where config, log and state go; must exist.
        config: the Serve config to start from; port and `state_dir` are replaced, the model is the built-in one.
        models: directory of built models, linked into the state directory.
        ray_dir: for Ray's files. Its path must be short: there will be sockets below.
        port: of HTTP; None takes a free one.
        command: what is started, with the config's path as last argument; None is `mace serve` of this environment.
    """

    def __init__(
        self,
        directory: Path,
        config: Path,
        models: Path,
        ray_dir: Path,
        port: int | None = None,
        command: Sequence[str | Path] | None = None,
    ) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.url = f"http://127.0.0.1:{port or free_port()}"
        self.log = directory / "serve.log"
        self._config = directory / "serve_config.yaml"
        self._ray_dir = ray_dir
        self._command = command or (Path(sys.executable).with_name("mace"), "serve")
        self._strangers = set(psutil.Process().children(recursive=True))
        self._root: psutil.Popen | None = None
        self.state_dir.mkdir(parents=True, exist_ok=True)
        (self.state_dir / "models").symlink_to(models.absolute())
        document = yaml.safe_load(config.read_text(encoding="utf-8"))
        self._adapt(document)
        self._config.write_text(yaml.safe_dump(document), encoding="utf-8")

    def launch(self) -> None:
        """Start `mace serve`; does not wait until it serves.

        Raises:
            ChaosError: processes of the last one are still there.
        """
        if self.family():
            raise ChaosError("the last server must be ended before another is started")
        environment = {**os.environ, "RAY_TMPDIR": str(self._ray_dir)}
        environment.pop("RAY_ADDRESS", None)  # never somebody else's cluster
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

    @property
    def root(self) -> psutil.Process:
        """The `mace serve` process, which may have ended.

        Raises:
            ChaosError: nothing was launched.
        """
        if self._root is None:
            raise ChaosError("no server was launched")
        return self._root

    @property
    def has_exited(self) -> bool:
        """Whether the `mace serve` process is gone."""
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
        for process in self.members():
            if process != but and part in title_of(process) and is_alive(process):
                return process
        return None

    def kill(self, victim: psutil.Process) -> None:
        """SIGKILL.

        Raises:
            ChaosError: it is no process of our server (any more).
        """
        if victim not in self.members():
            raise ChaosError(f"process {victim.pid} does not descend from our server; it was not killed")
        victim.kill()

    def family(self) -> list[psutil.Process]:
        """Members, and orphans of a killed server, which became our children; reaps those that have ended."""
        family = [p for p in psutil.Process().children(recursive=True) if p not in self._strangers]
        for process in family:
            if process != self._root and not is_alive(process):
                _reap(process)
        return [process for process in family if is_alive(process)]

    def end(self, *, politely: bool) -> int:
        """End everything that came of the server: `politely` by SIGTERM first. Returns how many had to be killed."""
        if politely and not self.has_exited:
            self.root.send_signal(signal.SIGTERM)
            with contextlib.suppress(psutil.TimeoutExpired):
                self.root.wait(_STOP_S)
            psutil.wait_procs(self.family(), timeout=_GRACE_S)
        num_killed = 0
        give_up_s = time.monotonic() + _GONE_S
        while (left := self.family()) and time.monotonic() < give_up_s:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    num_killed += 1
            time.sleep(0.1)
        if not self.has_exited:
            self.root.wait(_GONE_S)
        if left:
            raise ChaosError(f"processes that cannot be ended: {[process.pid for process in left]}")
        return num_killed

    def log_tail(self, num_chars: int = 1500) -> str:
        """The end of what the server printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-num_chars:] if self.log.exists() else ""

    def _adapt(self, document: dict[str, Any]) -> None:
        document["http_options"] = {
            **document.get("http_options", {}),
            "host": "127.0.0.1",
            "port": int(self.url.rpartition(":")[2]),
        }
        args = document["applications"][0].setdefault("args", {})
        args["state_dir"] = str(self.state_dir)
        args.setdefault("model", {})["model_source"] = "builtin:tiny-assistant"


def title_of(process: psutil.Process) -> str:
    """Its command line; empty if it has ended.

    vLLM's processes now and then fail to set their titles (setproctitle says nothing): then they are named by descent.
    """
    try:
        title = " ".join(process.cmdline()).strip()
        if _SPAWNED not in title:
            return title
        owner = process.parent()
        parent = " ".join(owner.cmdline()) if owner is not None else ""
    except psutil.Error:
        return ""
    if "ServeReplica" in parent:
        return "VLLM::EngineCore"
    return "VLLM::Worker" if _SPAWNED in parent or "VLLM::EngineCore" in parent else title


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _reap(process: psutil.Process) -> None:
    """Only our own children can be waited for; a zombie further down is its parent's."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
