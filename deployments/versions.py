"""Adapter versions as names that clients can ask for, and which of them is live.

`<name>` is the live version, `<name>@base` the bare base model, `<name>@v000N` one version. vLLM looks a model name up
in one dict and keeps the handle it found for the whole request; so publishing is one assignment in that dict, made
on the event loop: requests see either the old or the new version, and running ones finish on their own.
Each version has its own name and number inside vLLM, because its prefix cache is keyed by the adapter's name.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from alignment.adapter_files import version_number
from alignment.registry import AdapterRegistry, AdapterVersion
from core.errors import UnknownVersionError
from core.ports import EnginePort
from deployments.metrics import Meter

logger = logging.getLogger(__name__)

BASE = "base"


@dataclass(slots=True)
class PublishTiming:
    """How long the last publish took: loading into the engine, and the pointer move itself."""

    load_s: float = 0.0
    move_s: float = 0.0


class AdapterVersions:
    """The served names. Methods run on the replica's event loop; disk work goes to threads."""

    def __init__(self, engine: EnginePort, registry: AdapterRegistry, model_id: str) -> None:
        self._engine = engine
        self._registry = registry
        self._model_id = model_id
        self._names: dict[str | None, Any] = {}
        self._live: str | None = None
        self._changing = asyncio.Lock()
        self._meter = Meter("executor")
        self.last_publish = PublishTiming()

    @property
    def live(self) -> str:
        """Version that `<name>` answers with: `v000N` or `base`."""
        return self._live or BASE

    @property
    def base_names(self) -> list[str]:
        """Names of the base model. `<name>` is one of them until a version is live."""
        return [f"{self._model_id}@{BASE}", self._model_id]

    async def attach(self, names: dict[str | None, Any]) -> None:
        """Take over vLLM's dict of adapter names; fill in the versions on disk and restore the live one.

        A damaged version is left out; if it is the live one, the newest sound one before it takes its place.
        """
        self._names = names
        for version in await asyncio.to_thread(self._published):
            self._names[self._name_of(version)] = self._handle(version)
        await self._point_at(await asyncio.to_thread(self._registry.recover_live))

    async def publish(self, version: AdapterVersion) -> None:
        """Make a committed version known and live."""
        self._names[self._name_of(version)] = self._handle(version)
        await self.activate(version.name)

    async def follow_registry(self) -> bool:
        """Point where the registry points, if another executor on the same state directory moved it.

        Returns:
            Whether something changed here.

        Raises:
            AdapterError: the version cannot be loaded; what was live here stays live here.
        """
        async with self._changing:
            name = await asyncio.to_thread(self._registry.live_name)
            if name == self._live:
                return False
            version = None if name is None else await asyncio.to_thread(self._registry.get, name)
            if version is not None:
                self._names[self._name_of(version)] = self._handle(version)
            await self._point_at(version)
            return True

    async def activate(self, name: str) -> None:
        """Point `<name>` at a version, or at `base`.

        Raises:
            UnknownVersionError: no such published version.
            DamagedAdapterError: it cannot be loaded; what was live stays live.
        """
        async with self._changing:
            if name == BASE:
                await asyncio.to_thread(self._registry.activate, None)
                await self._point_at(None)
                return
            version = await asyncio.to_thread(self._registry.get, name)
            if version.manifest.status != "published":
                raise UnknownVersionError(f"{name} was rejected by the gate: {version.manifest.reason}")
            await self._point_at(version)
            await asyncio.to_thread(self._registry.activate, name)

    def cards(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists: live, with the version behind it as parent, base, then every version."""
        base = f"{self._model_id}@{BASE}"
        cards: list[dict[str, Any]] = [
            {"id": self._model_id, "parent": f"{self._model_id}@{self.live}"},
            {"id": base, "parent": None},
        ]
        cards += [
            {"id": name, "parent": base} for name in sorted(filter(None, self._names)) if name != self._model_id
        ]
        return cards

    async def listing(self) -> list[dict[str, Any]]:
        """What `/v1/adapters` lists: every version on disk with its manifest, damaged ones with their error."""
        return await asyncio.to_thread(self._listing)

    async def _point_at(self, version: AdapterVersion | None) -> None:
        started_s = time.perf_counter()
        if version is None:
            await self._engine.set_live(None)
            for name in (self._model_id, None):
                self._names.pop(name, None)
            self._live = None
        else:
            handle = self._handle(version)
            await self._engine.load_version(handle)
            await self._engine.set_live(version.path)
            loaded_s = time.perf_counter()
            # vLLM looks up what the request says; a request that names no model (None) gets the live one too.
            self._names[self._model_id] = self._names[None] = handle
            self._live = version.name
            self.last_publish = PublishTiming(loaded_s - started_s, time.perf_counter() - loaded_s)
        self._meter.set_gauge("adapter_version", 0 if version is None else _number(version))

    def _name_of(self, version: AdapterVersion) -> str:
        return f"{self._model_id}@{version.name}"

    def _handle(self, version: AdapterVersion) -> Any:
        return self._engine.version_handle(self._name_of(version), _number(version), version.path)

    def _published(self) -> list[AdapterVersion]:
        usable = [version for version in self._registry.list() if version.manifest.status == "published"]
        for name, error in self._registry.damaged.items():
            logger.error("adapter version %s is left out: %s", name, error)
        return usable

    def _listing(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for version in self._registry.list():
            manifest = version.manifest.model_dump(mode="json", exclude={"pair_ids", "config"})
            rows.append(
                {**manifest, "live": version.name == self.live, "num_pairs": len(version.manifest.pair_ids)}
            )
        for name, error in self._registry.damaged.items():
            rows.append({"version": name, "status": "damaged", "live": False, "reason": str(error)})
        return sorted(rows, key=lambda row: version_number(row["version"]) or 0)


def _number(version: AdapterVersion) -> int:
    return version_number(version.name) or 0
