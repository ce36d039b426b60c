"""Which parameters are in the trained model, and what of them goes to and comes from disk."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from core.errors import DamagedAdapterError
from core.files import remove_partial_files
from core.types import Checkpoint
from engine.training.checkpoint_writer import CheckpointWriter
from engine.training.shadow import ShadowAdapter

logger = logging.getLogger(__name__)

_DISK_PATIENCE_S = 60.0


class AdapterKeeper:
    """The shadow adapter, the live one that may stand in for it, and the checkpoints of both with the optimizer's.

    `REMOTE_METHODS` are called between two iterations. They mean the shadow, also while an evaluation of the live
    adapter is in progress.
    """

    REMOTE_METHODS = frozenset(
        {"save_adapter", "load_adapter", "set_live", "save_training_state", "load_training_state"}
    )

    def __init__(self, shadow: ShadowAdapter) -> None:
        self.shadow = shadow
        self.checkpoints = CheckpointWriter()
        self._live = shadow.zeros()
        self._live_stands_in = False

    def put_live_in(self) -> None:
        """Let the live adapter stand in for the shadow; see `put_shadow_back`."""
        self.shadow.exchange(self._live)
        self._live_stands_in = True

    def put_shadow_back(self) -> None:
        """Undo `put_live_in`; without one it does nothing."""
        if self._live_stands_in:
            self.shadow.exchange(self._live)
            self._live_stands_in = False

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Copy the state after a step and have it written; failures are kept for the next result."""
        try:
            state = self.shadow.checkpoint()
            if state.tensors["flat"].is_cuda:
                torch.cuda.synchronize(state.tensors["flat"].device)  # another thread reads it
        except RuntimeError as error:
            self.checkpoints.note_error(f"{type(error).__name__}: {error}")
        else:
            self.checkpoints.submit(Path(checkpoint.path), state, checkpoint.progress)

    def save_adapter(self, directory: str, base_model: str) -> None:
        """Write the shadow adapter in PEFT format.

        Raises:
            AdapterError: the directory cannot be written.
        """
        with self._shadow_in_place():
            self.shadow.save(directory, base_model)

    def load_adapter(self, directory: str | None) -> None:
        """Set the shadow adapter to a saved version, or to the seeded start; the optimizer starts afresh.

        Raises:
            DamagedAdapterError: the directory is unreadable or does not fit; the adapter is unchanged.
        """
        with self._shadow_in_place():
            if directory is None:
                self.shadow.reset()
            else:
                self.shadow.load(directory)

    def set_live(self, directory: str | None) -> None:
        """Remember a version (None: the bare base) as the one that `on_live` evaluations score.

        Raises:
            DamagedAdapterError: the directory is unreadable or does not fit.
        """
        live = self.shadow.zeros() if directory is None else self.shadow.read(directory)
        with self._shadow_in_place():
            self._live = live

    def save_training_state(self, path: str, progress: dict[str, Any]) -> None:
        """Write shadow adapter, optimizer and progress now; inference waits for the disk.

        Raises:
            AdapterError: the file cannot be written; an older one at `path` is intact.
        """
        self.checkpoints.wait(_DISK_PATIENCE_S)  # an older state must not come after this one
        with self._shadow_in_place():
            self.shadow.save_training_state(path, progress)

    def load_training_state(self, path: str) -> dict[str, Any] | None:
        """Restore shadow adapter and optimizer and return the progress; None if there is no usable file (logged)."""
        self.checkpoints.wait(_DISK_PATIENCE_S)
        remove_partial_files(Path(path))
        if not Path(path).exists():
            return None
        try:
            with self._shadow_in_place():
                return self.shadow.load_training_state(path)
        except DamagedAdapterError as error:
            logger.warning("training state ignored: %s", error)
            return None

    @contextmanager
    def _shadow_in_place(self) -> Iterator[None]:
        stood_in = self._live_stands_in
        self.put_shadow_back()
        try:
            yield
        finally:
            if stood_in:
                self.put_live_in()
