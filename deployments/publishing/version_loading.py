"""Brings a version into the engine before its first request: weights, hot prefixes, and the trainer's live adapter."""

import time
from dataclasses import dataclass
from pathlib import Path

from alignment.versions.registry import AdapterVersion
from core.ports import EnginePort
from deployments.publishing.prefix_warmer import PrefixWarmer, WarmReport
from deployments.publishing.served_names import ServedNames


@dataclass(slots=True)
class PublishTiming:
    """How long the last publish took, and what was warmed for it."""

    load_s: float = 0.0
    """Loading into vLLM and the trainer."""
    warm_s: float = 0.0
    """Computing shared prefixes; requests go on meanwhile, on the version before."""
    warmed_prefixes: int = 0
    warmed_tokens: int = 0
    warm_error: str | None = None
    warm_failures: int = 0
    """Times that warming ended early, since the start."""
    move_s: float = 0.0
    """The pointer move itself."""


class VersionLoader:
    """Loads versions. A version that cannot be loaded is an AdapterError and changes nothing for requests."""

    def __init__(self, engine: EnginePort, names: ServedNames, warmer: PrefixWarmer, root: Path) -> None:
        self._engine = engine
        self._names = names
        self._warmer = warmer
        self._root = root
        self.last = PublishTiming()
        """Of what was loaded last, on trial or live."""

    async def load(self, version: AdapterVersion, *, warm: bool) -> None:
        """What vLLM needs before the first request; instant if it has it already."""
        started_s = time.perf_counter()
        handle = self._names.add(version)
        await self._engine.load_version(handle)
        self.last.load_s = time.perf_counter() - started_s
        self._note(await self._warmer.warm(handle) if warm else WarmReport())

    async def load_live(self, version: AdapterVersion | None, *, warm: bool) -> None:
        """What the whole engine needs before `version` (None: the base) answers for `<name>`."""
        self.last.load_s = 0.0
        if version is not None:
            await self.load(version, warm=warm)
        else:
            self._note(WarmReport())  # the base has kept its own
        started_s = time.perf_counter()
        await self._engine.set_live(version.path if version else None)
        self.last.load_s += time.perf_counter() - started_s

    async def take_back(self, name: str | None) -> None:
        """The trainer's live adapter is `name` (None: the base) again."""
        await self._engine.set_live(self._root / name if name else None)

    def _note(self, report: WarmReport) -> None:
        self.last.warm_s, self.last.warm_error = report.wall_s, report.error
        self.last.warmed_prefixes, self.last.warmed_tokens = report.num_prefixes, report.num_tokens
        self.last.warm_failures = self._warmer.num_failures
