"""Where the shadow adapter stands: which version it was trained on from, its checkpoint, and going back."""

import asyncio
import logging
from pathlib import Path

from alignment.versions.registry import AdapterRegistry
from alignment.versions.serving_state import BASE
from core.errors import AdapterError
from core.ports import EnginePort
from deployments.learning.training_progress import TrainingProgress
from deployments.publishing.versions import AdapterVersions

logger = logging.getLogger(__name__)


class ShadowKeeper:
    """Keeps the shadow adapter, its progress and its checkpoint in step with the versions."""

    def __init__(
        self, engine: EnginePort, versions: AdapterVersions, registry: AdapterRegistry, checkpoint: Path
    ) -> None:
        self._engine = engine
        self._versions = versions
        self._registry = registry
        self.checkpoint = checkpoint
        self.progress = TrainingProgress()

    async def restore(self) -> None:
        """Put the shadow adapter where training left off: the last checkpoint, if it belongs to what is live."""
        saved = await self._engine.load_training_state(self.checkpoint)
        base = self._versions.training_base
        try:
            progress = TrainingProgress.from_wire(saved or {})
        except (TypeError, ValueError) as error:
            logger.warning("the checkpoint's progress is not readable: %s", error)
            saved, progress = None, TrainingProgress()
        if saved is not None and await self._made_from(base, progress):
            self.progress = progress.from_version(base)  # published, and killed before that was written down
        elif saved is not None and base in (progress.base, progress.instead_of):
            self.progress = progress
        else:
            self.progress = progress
            await self.return_to_base()

    async def return_to_base(self, generations: int = 0) -> None:
        """Set the shadow adapter to what training goes on from: the last good state, live or on trial.

        Args:
            generations: go back to an ancestor of that state; beyond the first version lies the bare model.
        """
        goal = self._versions.training_base
        base = await asyncio.to_thread(self._ancestor, goal, generations)
        directory: Path | None = None
        if base != BASE:
            directory = (await asyncio.to_thread(self._registry.get, base)).path
        try:
            await self._engine.load_adapter(directory)
        except AdapterError as error:
            logger.warning("shadow adapter starts afresh: %s", error)
            await self._engine.load_adapter(None)
        await self.begin_at(base, "" if base == goal else goal)

    async def begin_at(self, version: str, instead_of: str = "") -> None:
        """The shadow adapter is that version now; an ancestor `instead_of` the last good state."""
        self.progress = self.progress.from_version(version, instead_of)
        await self._engine.save_training_state(self.checkpoint, self.progress.to_wire())

    def _ancestor(self, version: str, generations: int) -> str:
        """The version itself (0), its parent (1) and so on; the bare model beyond the first and for what is gone."""
        for _ in range(generations):
            if version == BASE:
                break
            try:
                version = self._registry.get(version).manifest.parent or BASE
                if version != BASE:
                    self._registry.get(version)
            except AdapterError:  # deleted or damaged
                return BASE
        return version

    async def _made_from(self, version: str, progress: TrainingProgress) -> bool:
        """Is that version the adapter of this checkpoint?"""
        if version == BASE:
            return False
        config = (await asyncio.to_thread(self._registry.get, version)).manifest.config
        return config.get("total_steps") == progress.total_steps and config.get("trained_from") == progress.base
