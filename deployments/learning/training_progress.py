"""State of the shadow adapter: the version that it is trained on from, its checkpoint, and the way back.

A checkpoint is written after every optimizer step by the worker, atomically; what a learner must know to go on after a
restart travels in its header. Replicas on one state directory each claim a file of their own.
"""

import asyncio
import fcntl
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from alignment.versions.registry import AdapterRegistry
from alignment.versions.serving_state import BASE
from core.errors import AdapterError
from core.files import make_directory
from core.fingerprint import differing_parts
from core.ports import EnginePort
from core.wire import Rebuild
from deployments.publishing.versions import AdapterVersions

logger = logging.getLogger(__name__)

_MAX_REPLICAS = 1024


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """History of the shadow adapter, as a checkpoint tells it."""

    base: str = BASE
    """Version that the shadow adapter was trained on from: `v000N`, or `base` for the bare model."""
    instead_of: str = ""
    """The last good state, if training went back to an ancestor of it because too many candidates were refused."""
    total_steps: int = 0
    """Optimizer steps since the first one on this state directory; never goes back."""
    steps_since_candidate: int = 0
    candidate_pairs: tuple[str, ...] = ()
    """Ids of the pairs trained on since `base`."""
    rebuild: Rebuild | None = None
    """Set while the adapter is learnt anew from the base, for `goal` or better to be replaced by."""
    fingerprint: str = ""
    """The base model by its content; empty: written before there were fingerprints."""

    @property
    def goal(self) -> str:
        """The last good state, which training goes on from: `base` itself unless that is an ancestor of it."""
        return self.instead_of or self.base

    def after_step(self, pair_ids: Iterable[str]) -> "TrainingProgress":
        """Progress once one more step on these pairs is done."""
        return replace(
            self,
            total_steps=self.total_steps + 1,
            steps_since_candidate=self.steps_since_candidate + 1,
            candidate_pairs=tuple(dict.fromkeys((*self.candidate_pairs, *pair_ids))),
        )

    def from_version(self, version: str, instead_of: str = "") -> "TrainingProgress":
        """The shadow adapter is that version now, and nothing has been learnt since."""
        return TrainingProgress(version, instead_of, self.total_steps, fingerprint=self.fingerprint)

    def to_wire(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> "TrainingProgress":
        """Inverse of `to_wire`; a ValueError if it is no progress."""
        return _PROGRESS.validate_python(data)


_PROGRESS = TypeAdapter(TrainingProgress)


@dataclass(eq=False, repr=False)
class ShadowKeeper:
    """Keeps the shadow adapter, its progress and its checkpoint in step with the versions."""

    engine: EnginePort
    versions: AdapterVersions
    registry: AdapterRegistry
    checkpoint: Path
    progress: TrainingProgress = TrainingProgress()
    ended_rebuild: Rebuild | None = None
    """A rebuild whose version was published just before a restart, of which nobody was told."""

    async def restore(self) -> None:
        """Put the shadow adapter where training left off: the last checkpoint, if it belongs to what is live."""
        saved = await self.engine.load_training_state(self.checkpoint)
        base = self.versions.training_base
        try:
            known = TrainingProgress.from_wire(saved) if saved else None
        except ValueError as error:
            logger.warning("the checkpoint's progress is not readable: %s", error)
            known = None
        mine = self.registry.fingerprint
        if known is not None and differing_parts(known.fingerprint or mine, mine or known.fingerprint):
            logger.warning("the checkpoint is of another base model; training goes on without it")
            known = None
        self.progress = replace(known or self.progress, fingerprint=mine)
        known = known and self.progress
        if known is not None and await self._is_checkpoint_of(base):
            self.ended_rebuild = known.rebuild
            self.progress = known.from_version(base)  # published, and killed before that was written down
        elif known is not None and base == known.base:
            self.progress = replace(known, instead_of="")  # the ancestor that training went back to is live by now
        elif known is None or (base != known.instead_of and known.rebuild is None):
            await self.return_to_base()

    async def return_to_base(self, generations: int = 0) -> None:
        """Set the shadow adapter to what training goes on from: the last good state, live or on trial.

        `generations`: go back to an ancestor of that state; beyond the first version lies the bare model.
        """
        goal = self.versions.training_base
        base = await asyncio.to_thread(self._ancestor, goal, generations)
        directory = None if base == BASE else (await asyncio.to_thread(self.registry.get, base)).path
        try:
            await self.engine.load_adapter(directory)
        except AdapterError as error:
            logger.warning("shadow adapter starts afresh: %s", error)
            await self.engine.load_adapter(None)
        await self.begin_at(base, "" if base == goal else goal)

    async def begin_rebuild(self, rebuild: Rebuild) -> None:
        """Set the shadow adapter to the bare model, to learn all anew; what is live is what training returns to."""
        await self.engine.load_adapter(None)
        self.progress = replace(self.progress.from_version(BASE), rebuild=rebuild)
        self.follow()
        await self.engine.save_training_state(self.checkpoint, self.progress.to_wire())

    def follow(self) -> None:
        """Another version is live during a rebuild: nothing changes but what it is instead of."""
        base = self.versions.training_base
        self.progress = replace(self.progress, instead_of="" if base == BASE else base)

    async def begin_at(self, version: str, instead_of: str = "") -> None:
        """The shadow adapter is that version now; an ancestor `instead_of` the last good state."""
        self.progress = self.progress.from_version(version, instead_of)
        await self.engine.save_training_state(self.checkpoint, self.progress.to_wire())

    def _ancestor(self, version: str, generations: int) -> str:
        """The version itself (0), its parent (1) and so on; the bare model beyond the first and for what is gone."""
        for _ in range(generations):
            if version == BASE:
                break
            try:
                version = self.registry.get(version).manifest.parent or BASE
                if version != BASE:
                    self.registry.get(version)
            except AdapterError:  # deleted or damaged
                return BASE
        return version

    async def _is_checkpoint_of(self, version: str) -> bool:
        """The version was made from the adapter of this checkpoint."""
        if version == BASE:
            return False
        config = (await asyncio.to_thread(self.registry.get, version)).manifest.config
        mine = self.progress
        return config.get("total_steps") == mine.total_steps and config.get("trained_from") == mine.base


def claim_checkpoint(training: Path, fingerprint: str) -> tuple[Path, int]:
    """Take the first checkpoint file of a base model that no living replica has: `checkpoint.safetensors`, then
    `checkpoint-1` and so on, in a directory of the model's own, so that one model never writes over another's.

    The descriptor of its lock comes with it: the file is given back when that is closed or the process dies. Files that
    an older MACE wrote beside these directories become those of the first model that is served.
    """
    directory = training / fingerprint
    try:
        is_first = training.is_dir() and not any(path.is_dir() for path in training.iterdir())
        make_directory(directory)
        for older in training.glob("checkpoint*.safetensors") if is_first else ():
            older.replace(directory / older.name)
        for number in range(_MAX_REPLICAS):
            name = "checkpoint" if number == 0 else f"checkpoint-{number}"
            descriptor = os.open(directory / f".{name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            return directory / f"{name}.safetensors", descriptor
    except OSError as error:
        raise AdapterError(f"no checkpoint can be kept in {directory}: {error}") from error
    raise AdapterError(f"{_MAX_REPLICAS} replicas have a checkpoint in {directory}")
