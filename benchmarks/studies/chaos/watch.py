"""What can be seen from outside while processes die: adapter versions, the training checkpoint, the learner."""

import asyncio
import hashlib
import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from alignment.versions.adapter_files import WEIGHTS_FILE, check_files, read_manifest, version_number
from core.errors import DamagedAdapterError

CHECKPOINT = Path("training") / "checkpoint.safetensors"
_SECOND_LOOK_S = 0.3
_POLL_S = 0.25
_LOOK_EVERY = 4
"""Polls between two looks at all versions."""


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
            if version_number(path.name) is not None:
                self._check(path)
        self._check_live()

    def note_listing(self, listing: dict[str, Any]) -> None:
        """Check the reply of `GET /v1/adapters`."""
        for row in listing["data"]:
            if row["status"] == "damaged":
                self.half_written[row["version"]] = f"listed as damaged: {row.get('reason')}"

    def _check(self, path: Path) -> None:
        problem = self._problem(path)
        if problem is not None:  # retention may have removed it while we read; then it is gone now
            time.sleep(_SECOND_LOOK_S)
            problem = self._problem(path) if path.exists() else None
        if problem is not None:
            self.half_written[path.name] = problem

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


@dataclass(frozen=True, slots=True)
class SavedTraining:
    """What the header of a training checkpoint tells."""

    total_steps: int
    """Optimizer steps since the beginning; where the file does not tell, those of its optimizer."""
    steps_since_candidate: int | None = None
    base: str | None = None
    """Version that these steps were made from."""


def read_checkpoint(path: Path) -> SavedTraining | None:
    """The header of a checkpoint; None: there is no readable one."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(json.loads(file.read(min(size, 1 << 24)))["__metadata__"]["mace"])
        progress = header.get("progress") or {}
        total = int(progress.get("total_steps", header["num_steps"]))
        return SavedTraining(total, progress.get("steps_since_candidate"), progress.get("base"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None


@dataclass(frozen=True, slots=True)
class Learning:
    """The learner's status at a moment, as `GET /v1/training` tells it. None where the server does not tell."""

    started_at: float
    """When this learner began; another value is another process."""
    phase: str
    steps: int
    """Of this process."""
    total_steps: int | None = None
    """Since the beginning, across restarts."""
    restored_steps: int | None = None
    """What this process began with."""
    steps_since_candidate: int | None = None
    live: str | None = None
    has_decided: bool = False
    """Whether this process has judged a candidate."""

    @classmethod
    def from_wire(cls, reply: dict[str, Any]) -> "Learning | None":
        """None: the server has no learner (yet)."""
        status = reply.get("executor", {})
        if "started_at" not in status:
            return None
        total = status.get("total_steps")
        restored = status.get("restored_steps", None if total is None else total - status["steps"])
        return cls(
            started_at=status["started_at"],
            phase=status["phase"],
            steps=status["steps"],
            total_steps=total,
            restored_steps=restored,
            steps_since_candidate=status.get("steps_since_candidate"),
            live=status.get("live_version"),
            has_decided=status.get("last_decision") is not None,
        )


@dataclass(slots=True)
class Watch:
    """Polls a server for as long as `run` runs."""

    client: httpx.AsyncClient
    state_dir: Path
    versions: VersionWatch
    learning: Learning | None = None
    """The newest status."""
    live: str | None = None
    polls: int = 0

    async def run(self) -> None:
        """Until cancelled. A server that does not answer is no news here."""
        while True:
            await self.poll()
            if self.polls % _LOOK_EVERY == 0:
                await self._look()
            await asyncio.sleep(_POLL_S)

    async def poll(self) -> Learning | None:
        """The learner's status now; None if the server does not tell."""
        self.polls += 1
        reply = await self._get("/v1/training")
        newest = None if reply is None else Learning.from_wire(reply)
        self.learning = newest or self.learning
        return newest

    async def is_ready(self) -> bool:
        """Whether `/ready` says so; notes the live version."""
        reply = await self._get("/ready")
        if reply is None or not reply.get("ready"):
            return False
        self.live = reply["live"]
        return True

    def checkpoint(self) -> SavedTraining | None:
        """The one on disk."""
        return read_checkpoint(self.state_dir / CHECKPOINT)

    def commits_begun(self) -> set[str]:
        """Versions in the making on disk; a killed process leaves its own behind until the next start."""
        return {path.name for path in (self.state_dir / "adapters").glob(".tmp-*")}

    async def _look(self) -> None:
        await asyncio.to_thread(self.versions.look)
        listing = await self._get("/v1/adapters")
        if listing is not None:
            self.versions.note_listing(listing)

    async def _get(self, path: str) -> dict[str, Any] | None:
        try:
            reply = await self.client.get(path, timeout=5)
            return dict(reply.json()) if reply.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None
