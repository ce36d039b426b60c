"""vLLM's dict from model names to adapter handles, which is where a version becomes reachable over HTTP."""

from pathlib import Path
from typing import Any

from alignment.versions.activation_log import BASE
from alignment.versions.adapter_files import version_number
from alignment.versions.registry import AdapterVersion
from core.ports import EnginePort


class ServedNames:
    """`<name>` for what is live, `<name>@v000N` for each version. Changes are single assignments on the event loop."""

    def __init__(self, engine: EnginePort, model_id: str) -> None:
        self._engine = engine
        self._model_id = model_id
        self._names: dict[str | None, Any] = {}

    def attach(self, names: dict[str | None, Any]) -> None:
        """Take over vLLM's dict."""
        self._names = names

    @property
    def live(self) -> Any:
        """Handle that `<name>` answers with; None is the bare base model."""
        return self._names.get(self._model_id)

    def of(self, version: str) -> str:
        """Model name of a version or of `base`."""
        return f"{self._model_id}@{version}"

    def add(self, version: AdapterVersion) -> Any:
        """Make a version reachable by its own name; returns its handle."""
        handle = self._handle(version.name, version.path)
        self._names[self.of(version.name)] = handle
        return handle

    def drop(self, name: str) -> None:
        """A version is not reachable any more: vLLM answers 404. Requests that run on it go on."""
        self._names.pop(self.of(name), None)

    async def unload(self, name: str, root: Path) -> None:
        """Forget a deleted version on the inference side."""
        await self._engine.unload_version(self._handle(name, root / name))

    def point_at(self, version: AdapterVersion | None) -> None:
        """Let `<name>` be a version, or the bare base model."""
        if version is None:
            for name in (self._model_id, None):
                self._names.pop(name, None)
        else:
            # vLLM looks up what the request says; a request that names no model (None) gets the live one too.
            self._names[self._model_id] = self._names[None] = self.add(version)

    def cards(self, live: str) -> list[dict[str, Any]]:
        """What `/v1/models` lists: live, with the version behind it as parent, base, then every version."""
        base = self.of(BASE)
        versions = sorted(filter(None, self._names.keys() - {self._model_id}))
        return [
            {"id": self._model_id, "parent": self.of(live)},
            {"id": base, "parent": None},
            *({"id": name, "parent": base} for name in versions),
        ]

    def _handle(self, name: str, path: Path) -> Any:
        return self._engine.version_handle(self.of(name), version_number(name) or 0, path)
