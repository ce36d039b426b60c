"""Adapter versions as names that clients can ask for, and which of them is live.

`<name>` is the live version, `<name>@base` the bare base model, `<name>@v000N` one version. vLLM looks a model name up
in one dict and keeps the handle it found for the whole request; so publishing is one assignment in that dict, made
on the event loop: requests see either the old or the new version, and running ones finish on their own.
Each version has its own name and number inside vLLM, because its prefix cache is keyed by the adapter's name; what
prompts share is computed for a version before it goes live (`deployments.publishing.prefix_warmer`).

`AdapterVersions` is the one owner of "what is live" in an executor. On disk the pointers are
`alignment.versions.serving_state`, which several executors share and follow. Others in this process ask the owner
(`live`, `training_base`). The trainer in the engine and Control are told by one call each:
`EnginePort.set_live`, before the name moves, and `ControlPort.note_live`, which the learner calls after it.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Any

from alignment.versions.adapter_files import version_number
from alignment.versions.lineage import is_rollback, lineage_row, lineage_rows
from alignment.versions.registry import AdapterRegistry, AdapterVersion
from alignment.versions.serving_state import BASE, Actor, Serving
from core.alignment_config import VersionsConfig
from core.errors import AdapterError, UnfitAdapterError, UnknownVersionError
from core.ports import EnginePort
from deployments.monitors.metrics import Meter
from deployments.publishing.prefix_warmer import PrefixWarmer, PublishTiming

logger = logging.getLogger(__name__)


class Published(StrEnum):
    """The fate of a version that passed the gate."""

    LIVE = "live"
    CANARY = "canary"
    """On trial; training goes on from it."""
    BLOCKED = "blocked"
    """A pin or another trial keeps it from the traffic; training goes back to what is live."""


class AdapterVersions:
    """The served names. Methods run on the replica's event loop; disk work goes to threads."""

    def __init__(
        self, engine: EnginePort, registry: AdapterRegistry, model_id: str, config: VersionsConfig | None = None
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._model_id = model_id
        self._config = config or VersionsConfig()
        self._warmer = PrefixWarmer(engine, self._config)
        self._names: dict[str | None, Any] = {}
        """vLLM's dict from model names to adapter handles, once it is attached."""
        self._known: set[str] = set()
        """Versions on disk that have been looked at, usable or not."""
        self._serving = Serving()
        """The pointers on disk, as this executor last saw them; `live` changes only together with the name."""
        self._num_kept: Counter[str] = Counter()
        """Requests under way, by the model name that each asked for."""
        self._leaving: set[str] = set()
        """Names that go when the last request that asked for them has ended."""
        self._deleted: set[str] = set()
        """Versions that are gone from disk and still loaded."""
        self._changing = asyncio.Lock()
        self._watchers: list[Callable[[], None]] = []
        self._meter = Meter("executor")
        self.last_publish = PublishTiming()
        """Timing of the last version that was brought in, on trial or live."""

    @property
    def live(self) -> str:
        """Version that `<name>` answers with: `v000N` or `base`."""
        return self._serving.live or BASE

    @property
    def pinned(self) -> str | None:
        """The pinned version, `v000N` or `base`; None if publishing is free."""
        return self._serving.pinned

    @property
    def canary(self) -> str | None:
        """The version on trial with a share of the traffic."""
        return self._serving.canary

    @property
    def training_base(self) -> str:
        """The version that training goes on from: the canary while there is one, else the live one; or `base`."""
        return self._serving.training_base or BASE

    @property
    def live_adapter(self) -> str | None:
        """The inference side's name of the live version; None is the bare base model."""
        return None if self._serving.live is None else self.name_of(self._serving.live)

    @property
    def live_handle(self) -> Any:
        """The inference side's handle of the live version; None is the bare base model."""
        return self._names.get(self._model_id)

    def watch(self, note: Callable[[], None]) -> None:
        """Call `note` from now on after what is live, on trial or pinned has changed, whoever changed it."""
        self._watchers.append(note)

    def has_name(self, model: str) -> bool:
        """May `model` be asked for?"""
        return model in self._names.keys() - self._leaving or model in (self._model_id, self.name_of(BASE))

    @contextmanager
    def kept(self, model: str) -> Iterator[None]:
        """While a request for `model` is under way the name stays, even if its version is retired meanwhile.

        vLLM looks the name up only when it has rendered the prompt.
        """
        self._num_kept[model] += 1
        try:
            yield
        finally:
            self._num_kept[model] -= 1
            if not self._num_kept[model]:
                del self._num_kept[model]
                if model in self._leaving:
                    self._leaving.discard(model)
                    self._names.pop(model, None)

    def name_of(self, version: str) -> str:
        """Model name of a version or of `base`."""
        return f"{self._model_id}@{version}"

    async def attach(self, names: dict[str | None, Any]) -> None:
        """Take over vLLM's dict of adapter names; fill in the versions on disk and restore the live one.

        A damaged version is left out; if it is the live one, the newest sound one before it takes its place.
        """
        self._names = names
        await asyncio.to_thread(self._registry.recover_live)
        await self.refresh()
        self._engine.watch_prompts(self._see_prompt)

    async def publish(self, version: AdapterVersion) -> Published:
        """Take in a version that passed the gate: live at once, on trial first, or blocked by a pin.

        Raises:
            AdapterError: it cannot be loaded, or the disk refuses; what was live stays live.
        """
        async with self._changing:
            reason = version.manifest.reason
            over = version.manifest.config.get("compared_with")
            if self._config.canary_share > 0:
                is_free = self._serving.pinned is None and self._serving.canary is None
                await self._load(version, warm=is_free)
                started = await asyncio.to_thread(self._registry.serving.start_canary, version.name, reason, over)
                await self._read_pointers()
                outcome = Published.CANARY if started else Published.BLOCKED
            else:
                moved = await self._move(version, "gate", reason, over=over)
                outcome = Published.LIVE if moved else Published.BLOCKED
            if outcome is Published.BLOCKED:
                logger.info("%s passed the gate but is blocked; its lineage says why", version.name)
            return outcome

    async def activate(self, name: str, *, pin: bool | None = None, reason: str = "") -> None:
        """Point `<name>` at a version, or at `base`, because someone said so; ends a trial.

        `pin`: whether the gate may move on from it; None: pinned if it is older than the newest good version.

        Raises:
            UnknownVersionError: no such published version.
            DamagedAdapterError: it cannot be loaded; what was live stays live.
        """
        async with self._changing:
            version = None if name == BASE else await asyncio.to_thread(self._registry.get, name)
            if version is not None and version.manifest.status != "published":
                raise UnknownVersionError(f"{name} was rejected by the gate: {version.manifest.reason}")
            if pin is None:
                pin = await asyncio.to_thread(is_rollback, self._registry, name)
            await self._move(version, "api", reason, pin=pin)

    async def release_pin(self, reason: str = "") -> bool:
        """Let the gate publish again; False if nothing was pinned."""
        async with self._changing:
            released = await asyncio.to_thread(self._registry.serving.release_pin, reason)
            await self._read_pointers()
            return released

    async def promote_canary(self, name: str, reason: str) -> bool:
        """End a trial well: the canary goes live. False if it is not on trial (any more)."""
        async with self._changing:
            return await self._move(await asyncio.to_thread(self._registry.get, name), "canary", reason)

    async def roll_back_canary(self, name: str, reason: str) -> bool:
        """End a trial badly: the canary gets no more traffic. False if it is not on trial (any more)."""
        async with self._changing:
            ended = await asyncio.to_thread(lambda: self._registry.serving.roll_back(name, reason=reason))
            await self._read_pointers()
            return ended

    async def refresh(self) -> None:
        """Take over what is on disk: new and deleted versions, and where this or another executor moved the pointers.

        Raises:
            AdapterError: the live version cannot be loaded; what was live here stays live here.
        """
        async with self._changing:
            serving, new, gone = await asyncio.to_thread(self._look)
            for version in new:
                self._names[self.name_of(version.name)] = self._handle(version.name)
            await self._forget(serving.retired.keys(), gone)
            if serving.live != self._serving.live:
                followed = await asyncio.to_thread(self._registry.get, serving.live) if serving.live else None
                await self._load_live(followed, warm=serving.pinned is None)  # a pin: it was moved by hand
                self._point_at(followed)
            if serving.canary is not None and serving.canary != self._serving.canary:
                await self._load(await asyncio.to_thread(self._registry.get, serving.canary), warm=True)
            self._take_over(serving)

    async def reload(self) -> None:
        """Load what an engine that came back must have before a request: the live version, and the one on trial."""
        async with self._changing:
            self._deleted.clear()
            live, canary = self._serving.live, self._serving.canary
            version = await asyncio.to_thread(self._registry.get, live) if live else None
            await self._load_live(version, warm=False)
            if canary is not None:
                await self._load(await asyncio.to_thread(self._registry.get, canary), warm=False)

    async def retire_old(self) -> list[str]:
        """Retire versions beyond `versions.keep` and delete retired ones that have rested; returns what was deleted."""
        async with self._changing:
            in_use = {name.rpartition("@")[2] for name in self._engine.versions_in_use() | self._num_kept.keys()}
            in_use.add(self.training_base)
            retired, deleted = await asyncio.to_thread(self._registry.retire_old, self._config.keep, in_use)
            await self._forget(retired, deleted)
            return deleted

    def cards(self) -> list[dict[str, Any]]:
        """List the names for `/v1/models`: live, with the version behind it as parent, base, then every version."""
        base = self.name_of(BASE)
        versions = sorted(filter(None, self._names.keys() - {self._model_id} - self._leaving))
        return [
            {"id": self._model_id, "parent": self.name_of(self.live)},
            {"id": base, "parent": None},
            *({"id": name, "parent": base} for name in versions),
        ]

    async def listing(self) -> list[dict[str, Any]]:
        """List for `/v1/adapters` every version on disk with its lineage, damaged ones with their error."""
        return await asyncio.to_thread(lineage_rows, self._registry)

    async def detail(self, name: str) -> dict[str, Any]:
        """Describe one version, or `base`, with all that happened to it; UnknownVersionError if there is none."""
        return await asyncio.to_thread(lineage_row, self._registry, name)

    async def canary_since_s(self) -> float | None:
        """Start of the trial in Unix seconds; None if there is none."""
        return await asyncio.to_thread(self._registry.serving.canary_since_s)

    async def _move(
        self, version: AdapterVersion | None, by: Actor, reason: str, *, pin: bool = False, over: str | None = None
    ) -> bool:
        """Engine first, then the pointer on disk, then the name; a failure or a refusal takes the steps back."""
        # Who moves it by hand wants it now, and what a pin holds back would be warmed for nobody.
        await self._load_live(version, warm=by != "api" and self._serving.pinned is None)
        name = version.name if version else None
        moved = False
        try:
            moved = await asyncio.to_thread(
                lambda: self._registry.serving.activate(name, by=by, reason=reason, pin=pin, over=over)
            )
        finally:
            if moved:
                self._point_at(version)
            else:
                before = self._serving.live
                await self._engine.set_live(self._registry.root / before if before else None)
        await self._read_pointers()
        return moved

    async def _load(self, version: AdapterVersion, *, warm: bool) -> None:
        """Load what vLLM needs before a version's first request: instant if it has it already."""
        started_s = time.perf_counter()
        handle = self._names[self.name_of(version.name)] = self._handle(version.name)
        self._leaving.discard(self.name_of(version.name))
        await self._engine.load_version(handle)
        load_s = time.perf_counter() - started_s
        self.last_publish = await self._warmer.warm(handle) if warm else PublishTiming()
        self.last_publish.load_s = load_s
        self.last_publish.warm_failures = self._warmer.num_failures

    async def _load_live(self, version: AdapterVersion | None, *, warm: bool) -> None:
        """Load what the whole engine needs before `version` (None: the base) answers for `<name>`."""
        if version is not None:
            await self._load(version, warm=warm)
        else:  # the base has kept its own keys
            self.last_publish = PublishTiming(warm_failures=self._warmer.num_failures)
        started_s = time.perf_counter()
        await self._engine.set_live(version.path if version else None)
        self.last_publish.load_s += time.perf_counter() - started_s

    def _point_at(self, version: AdapterVersion | None) -> None:
        """Let `<name>` be a version, or the bare base model (None)."""
        started_s = time.perf_counter()
        if version is None:
            self._names.pop(self._model_id, None)
            self._names.pop(None, None)
        else:
            # vLLM looks up what the request says; a request that names no model (None) gets the live one too.
            handle = self._handle(version.name)
            self._names[self._model_id] = self._names[None] = self._names[self.name_of(version.name)] = handle
        self.last_publish.move_s = time.perf_counter() - started_s
        self._take_over(replace(self._serving, live=version.name if version else None))
        self._meter.set_gauge("adapter_version", (version_number(version.name) or 0) if version else 0)

    async def _read_pointers(self) -> None:
        """Read what a change has left on disk. Where another executor moved `<name>` to, the next `refresh` follows."""
        on_disk = await asyncio.to_thread(self._registry.serving.read)
        self._take_over(replace(on_disk, live=self._serving.live))

    def _take_over(self, serving: Serving) -> None:
        """Go by these pointers from now on."""
        is_news, self._serving = serving != self._serving, serving
        for note in self._watchers if is_news else ():
            note()

    async def _forget(self, retired: Collection[str], deleted: Collection[str]) -> None:
        """Answer 404 for these names from now on; unload the deleted ones, when no request runs on them any more."""
        for model in map(self.name_of, {*retired, *deleted}):
            if model in self._num_kept:
                self._leaving.add(model)
            else:
                self._names.pop(model, None)
        self._known -= set(deleted)
        self._deleted |= set(deleted)
        in_use = self._engine.versions_in_use() | self._num_kept.keys()
        for name in [name for name in sorted(self._deleted) if self.name_of(name) not in in_use]:
            self._deleted.discard(name)
            await self._engine.unload_version(self._handle(name))

    def _handle(self, name: str) -> Any:
        path = self._registry.root / name
        return self._engine.version_handle(self.name_of(name), version_number(name) or 0, path)

    def _see_prompt(self, lora_name: str | None, prompt_ids: Sequence[int]) -> None:
        """Observe a prompt for the live version or the one on trial: the next version will be asked such prompts."""
        canary = self._serving.canary
        if lora_name == self.live_adapter or (canary is not None and lora_name == self.name_of(canary)):
            self._warmer.observe(prompt_ids)

    def _look(self) -> tuple[Serving, list[AdapterVersion], set[str]]:
        """The pointers, what is new on disk and can be served, and what is gone from there."""
        serving, on_disk = self._registry.serving.read(), self._registry.names()
        new = []
        for name in sorted(on_disk - self._known):
            try:
                version = self._registry.get(name)
            except AdapterError as error:
                level = logging.WARNING if isinstance(error, UnfitAdapterError) else logging.ERROR
                logger.log(level, "adapter version %s is left out: %s", name, error)
            else:
                if version.manifest.status == "published":
                    new.append(version)
        gone = self._known - on_disk
        self._known = on_disk
        return serving, new, gone
