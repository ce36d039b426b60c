"""A real `mace serve` on serve_config.yaml, in a directory of its own, and its processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.studies.chaos.server import title_of

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 240


class Server:
    """Started in `directory`; `sections` of the application's args are merged over the config file's."""

    def __init__(self, directory: Path, port: int, deployments: Sequence[dict[str, Any]] = (), **sections):
        self.directory = directory
        self.url = f"http://127.0.0.1:{port}"
        document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        document["http_options"]["port"] = port
        for name, section in sections.items():
            document["applications"][0]["args"].setdefault(name, {}).update(section)
        document["applications"][0]["deployments"] = list(deployments)
        self.config = directory / "serve_config.yaml"
        self.config.write_text(yaml.safe_dump(document))
        self.log = directory / "serve.log"
        self.process: psutil.Popen | None = None

    def start(self):
        mace = Path(sys.executable).with_name("mace")
        with self.log.open("wb") as log:
            self.process = psutil.Popen(
                [mace, "serve", self.config],
                cwd=self.directory,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_DEDUP_LOGS": "0"},
                start_new_session=True,
            )
        self.wait_until_ready()
        return self

    def wait_until_ready(self, timeout_s=START_TIMEOUT_S):
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise AssertionError(f"mace serve ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log.read_text()}")

    def call(self, method, path, **kwargs):
        return httpx.request(method, self.url + path, timeout=60, **kwargs)

    def descendants(self):
        return self.process.children(recursive=True)

    def process_named(self, part):
        titles = {process: title_of(process) for process in self.descendants()}
        for process, title in titles.items():
            if part in title:
                return process
        raise AssertionError(f"no process {part!r} among {sorted(titles.values())}")

    def stop(self, number=signal.SIGTERM, timeout_s=90):
        """End it by a signal; returns what is left of its processes (should be nothing)."""
        family = [self.process, *self.descendants()]
        self.process.send_signal(number)
        self.process.wait(timeout_s)
        _, alive = psutil.wait_procs(family, timeout=5)
        return alive
