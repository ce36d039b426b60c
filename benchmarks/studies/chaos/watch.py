"""Observe from outside, while processes die: adapter versions, the training checkpoint, the learner."""

import asyncio
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import httpx
from safetensors import SafetensorError, safe_open

from alignment.versions.adapter_files import WEIGHTS_FILE, check_files, read_manifest, version_number
from core.errors import DamagedAdapterError
from deployments.learning.training_progress import TrainingProgress

_SECOND_LOOK_S = 0.3
_POLL_S = 0.25
_LOOK_EVERY = 4
"""Polls between two looks at all versions."""

Learning = dict[str, Any]
"""The learner's status, as `GET /v1/training` tells it under `executor`. Another `started_at` is another process."""


class VersionWatch:
    """Looks at the adapter directory as another reader would, again and again."""

    def __init__(self, adapters: Path) -> None:
        self._adapters = adapters
        self._digests: dict[str, str] = {}
        self.looks = 0
        self.half_written: dict[str, str] = {}
        """Versions that were visible and not whole, or changed after they were visible, and what was wrong."""

    @property
    def seen(self) -> list[str]:
        """Every version ever seen whole."""
        return sorted(self._digests)

    def look(self) -> None:
        """Check every version on disk and the live pointer."""
        self.looks += 1
        if not self._adapters.is_dir():
            return
        for path in sorted(self._adapters.iterdir()):
            if version_number(path.name) is None:
                continue
            problem = self._problem(path)
            if problem is not None:  # retention may have removed it while we read; then it is gone now
                time.sleep(_SECOND_LOOK_S)
                problem = self._problem(path) if path.exists() else None
            if problem is not None:
                self.half_written[path.name] = problem
        self._check_live()

    def note_listing(self, listing: dict[str, Any]) -> None:
        """Check the reply of `GET /v1/adapters`."""
        for row in listing["data"]:
            if row["status"] == "damaged":
                self.half_written[row["version"]] = f"listed as damaged: {row.get('reason')}"

    def _problem(self, path: Path) -> str | None:
        try:
            read_manifest(path, None)
            check_files(path)
            digest = hashlib.sha256((path / WEIGHTS_FILE).read_bytes()).hexdigest()
        except (DamagedAdapterError, OSError) as error:
            return str(error)
        if self._digests.setdefault(path.name, digest) != digest:
            return f"{path.name}: the weights changed after the version was visible"
        return None

    def _check_live(self) -> None:
        for attempt in range(2):
            pointer = self._adapters / "live"
            name = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else ""
            if not name or (self._adapters / name).is_dir():
                return
            if attempt == 0:
                time.sleep(_SECOND_LOOK_S)
        self.half_written[f"live -> {name}"] = "the live pointer names a version that is not there"


def read_checkpoint(path: Path) -> TrainingProgress | None:
    """Read the learner's progress from the header of a training checkpoint; None: there is no readable one."""
    try:
        with safe_open(path, "numpy") as file:
            return TrainingProgress.from_wire(json.loads(file.metadata()["mace"])["progress"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


class Watch:
    """Polls a server for as long as `run` runs."""

    def __init__(self, client: httpx.AsyncClient, state_dir: Path) -> None:
        self._client = client
        self._state_dir = state_dir
        self.versions = VersionWatch(state_dir / "adapters")
        self.learning: Learning | None = None
        """The newest status."""

    async def run(self) -> None:
        """Poll until cancelled. A server that does not answer is no news here."""
        polls = 0
        while True:
            await self.poll()
            polls += 1
            if polls % _LOOK_EVERY == 0:
                await asyncio.to_thread(self.versions.look)
                self.versions.note_listing(await self._get("/v1/adapters") or {"data": []})
            await asyncio.sleep(_POLL_S)

    async def poll(self) -> Learning | None:
        """The learner's status now; None if the server does not tell, or has no learner yet."""
        newest: Learning = (await self._get("/v1/training") or {}).get("executor", {})
        if "started_at" not in newest:
            return None
        self.learning = newest
        return newest

    def checkpoint(self) -> TrainingProgress | None:
        """Progress of the checkpoint on disk; the study serves one base model, so there is one."""
        found = list((self._state_dir / "training").glob("*/checkpoint.safetensors"))
        return read_checkpoint(found[0]) if found else None

    def commits_begun(self) -> set[str]:
        """Directories of versions in the making; a killed process leaves its own behind until the next start."""
        return {path.name for path in (self._state_dir / "adapters").glob(".tmp-*")}

    async def _get(self, path: str) -> dict[str, Any] | None:
        try:
            reply = await self._client.get(path, timeout=5)
            return dict(reply.json()) if reply.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None
