"""A PostgreSQL server of Debian's packages in a temporary directory, on a Unix socket, for as long as tests need it."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest


def find_programs() -> Path | None:
    """The directory of `postgres` and `initdb`."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    on_path = shutil.which("postgres")
    if on_path:
        places.insert(0, Path(on_path).resolve().parent)
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


class PostgresServer:
    """Durable as by default (fsync on). The server refuses to run as root, so then it runs as another user."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
        self._process: subprocess.Popen[bytes] | None = None
        self._user: dict[str, object] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self._directory, nobody.pw_uid, nobody.pw_gid)
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        options = ["-A", "trust", "-U", "mace", "-E", "UTF8", "--locale=C", "--no-sync"]
        command = [programs / "initdb", "-D", self._directory / "data", *options]
        done = subprocess.run(command, capture_output=True, cwd="/", **self._user)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.decode())
        self.start()

    def url(self, schema: str = "public") -> str:
        """Where a store of its own schema is."""
        options = f"options=-csearch_path%3D{schema}"
        return f"postgresql+psycopg://mace@/postgres?host={self._directory}&{options}"

    def start(self) -> None:
        """Start, and wait until it takes connections."""
        settings = ["-c", "listen_addresses=", "-c", "shared_buffers=16MB", "-k", str(self._directory)]
        log = (self._directory / "log").open("ab")
        command = [self._programs / "postgres", "-D", self._directory / "data", *settings]
        self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **self._user)
        log.close()
        deadline = time.monotonic() + 60
        ready = [self._programs / "pg_isready", "-h", self._directory, "-q"]
        while subprocess.run(ready).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._directory / "log").read_text()[-2000:])
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop at once: SIGINT ends connections and shuts down, SIGQUIT leaves recovery to the next start."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(60)
            self._process = None

    def remove(self) -> None:
        """Stop, and delete everything."""
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)


def start_server() -> PostgresServer:
    """A running server; skips the test where none is installed."""
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'mace-serve[postgres]'")
    return PostgresServer(programs)
