"""The adapter in training: LoRA matrices and AdamW's state, its PEFT files, and the live version that may stand in.

All LoRA matrices of the model are views of one flat fp32 buffer, layer after layer. Gradient norm, AdamW and
copies are then one operation each instead of one per matrix (336 of them for 24 layers).
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core.config import TrainingConfig
from core.errors import AdapterError, DamagedAdapterError, DivergedError
from core.files import remove_partial_files
from core.types import Checkpoint
from engine.training.checkpoint import (
    CheckpointWriter,
    TrainingState,
    check_tensors,
    random_state,
    read_training_state,
    set_random_state,
)
from engine.training.optimizer import FlatAdamW
from engine.training.trainable import TrainableModel, training_mode

logger = logging.getLogger(__name__)

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_DISK_PATIENCE_S = 60.0
"""Wait so long for a checkpoint that is on its way to disk before another one is written or read."""
_NUM_COPIES = 2
"""Copies of the training state: one that is being written to disk, one to go back to from the step in progress."""


class ShadowAdapter:
    """Owner of the model's LoRA and of its optimizer. One per `TrainableModel`; not thread-safe.

    The live version may stand in for it while that one is evaluated. `REMOTE_METHODS` are called between two iterations
    and mean the shadow, also then.
    """

    REMOTE_METHODS = frozenset(
        {"save_adapter", "load_adapter", "set_live", "save_training_state", "load_training_state"}
    )

    def __init__(
        self,
        model: TrainableModel,
        config: TrainingConfig,
        optimizer_device: torch.device | None = None,
        copies_device: torch.device | None = None,
    ) -> None:
        """`optimizer_device` is where AdamW and its state live; None: where the model is.

        `copies_device` is where copies of that state are kept; None: where the optimizer is.
        """
        self._model = model
        self._config = config
        self._parameters = model.lora_parameters()
        self.num_steps = 0
        """Optimizer steps since the last reset or load."""
        self._latest: TrainingState | None = None
        """The copy that equals parameters and optimizer as they are, if one does."""
        with training_mode(model.device):
            self._flat = torch.cat([p.detach().flatten() for p in self._parameters.values()])
            for parameter, view in zip(self._parameters.values(), self._views(self._flat), strict=True):
                parameter.data = view
            self._optimizer = FlatAdamW(self._flat, config, optimizer_device)
            self._copies_device = copies_device
            # Made now, so that no later one surprises a device whose free memory is given out.
            self._copies = [self._empty_copy() for _ in range(_NUM_COPIES)]
        self.checkpoints = CheckpointWriter()
        self._saving: tuple[str, dict[str, Any]] | None = None
        """Path and progress of the state that `save_training_state` has begun to write."""
        self._stand_in = self.read(None)
        """Parameters of the live version, or of the shadow while that one stands in for it."""
        self._live_stands_in = False

    def tensors(self) -> dict[str, torch.Tensor]:
        """The LoRA matrices by PEFT name, copied to the CPU."""
        with training_mode(self._model.device):
            return self.named_views(self._flat.to("cpu", copy=True))

    def memory(self) -> dict[str, int]:
        """Device bytes of the adapter with its optimizer and the live version, and of the copies of that state.

        What is elsewhere takes none.
        """
        if self._optimizer.is_elsewhere:
            return {"trainer": self._flat.nbytes + self._stand_in.nbytes, "state_copies": 0}
        state = sum(tensor.nbytes for tensor in self.state_tensors().values()) + self._stand_in.nbytes
        copies = sum(tensor.nbytes for copy in self._copies for tensor in copy.tensors.values())
        return {"trainer": state, "state_copies": 0 if self._copies_device else copies}

    def new_gradients(self) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """A zeroed flat gradient buffer and, per layer, its views in the order of `layer_parameters`."""
        flat = torch.zeros_like(self._flat)
        views = iter(self._views(flat))
        return flat, [
            [next(views) for _ in self._model.layer_parameters(i)] for i in range(self._model.num_layers)
        ]

    def named_views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat buffer as matrices by PEFT name."""
        return dict(zip(self._parameters, self._views(flat), strict=True))

    def apply(self, gradients: torch.Tensor) -> float:
        """Clip the flat gradients (in place) and take one AdamW step; returns the norm before clipping.

        Raises:
            DivergedError: The norm is not finite, or a parameter or moment after the step is not.
            After any error parameters and optimizer are as before.
        """
        with training_mode(self._model.device):
            norm = gradients.norm().item()
            if not norm < float("inf"):
                raise DivergedError(f"gradient norm is {norm}")
            if norm > self._config.max_grad_norm:
                gradients.mul_(self._config.max_grad_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            before = self._copy()
            self._latest = None
            try:
                self._optimizer.step(gradients)
                self._check_finite()
                self._optimizer.give_out()
            except BaseException:
                self._put_back(before)
                raise
        self.num_steps += 1
        return norm

    def checkpoint(self) -> TrainingState:
        """A copy of everything that `restore` needs.

        It stays as it is while it `is_leased`. The next step uses it as the state to go back to, so that a checkpoint
        after each step costs no copy more than none.
        """
        with training_mode(self._model.device):
            state = self._copy()
            state.rng = random_state(self._model.device)
            if self._flat.is_cuda:
                torch.cuda.synchronize(self._flat.device)  # it is read in another thread and on another stream
            return state

    def restore(self, state: TrainingState) -> None:
        """Take over a state that `checkpoint` made; further steps are bit-equal to those of an uninterrupted run.

        On CUDA they are equal but for rounding: the backward pass of SDPA adds in no fixed order.

        Raises:
            DamagedAdapterError: It is of another LoRA shape, or holds values that are not finite; nothing changed.
        """
        if state.shapes != self._layout():
            raise DamagedAdapterError("training state belongs to another model or LoRA shape")
        with training_mode(self._model.device):
            mine = self.state_tensors()
            check_tensors(state.tensors, {name: tensor.shape for name, tensor in mine.items()}, "training state")
            for name, tensor in mine.items():
                tensor.copy_(state.tensors[name])
            self._optimizer.give_out()
        self.num_steps, self._latest = state.num_steps, None
        set_random_state(state.rng, self._model.device)

    def reset(self) -> None:
        """Back to the seeded start: B is zero, so the model is the base model. The optimizer forgets all."""
        with training_mode(self._model.device):
            self._model.reset_lora(self._config.seed)
            self._clear_optimizer()

    def exchange(self, flat: torch.Tensor) -> None:
        """Swap the parameters with those in `flat`, in place; optimizer state stays. Twice is no change."""
        with training_mode(self._model.device):
            mine = self._flat.clone()
            self._flat.copy_(flat)
            flat.copy_(mine)

    def put_live_in(self) -> None:
        """Let the live version stand in for the shadow; see `put_shadow_back`."""
        self.exchange(self._stand_in)
        self._live_stands_in = True

    def put_shadow_back(self) -> None:
        """Undo `put_live_in`; without one it does nothing."""
        if self._live_stands_in:
            self.exchange(self._stand_in)
            self._live_stands_in = False

    def set_live(self, directory: Path | str | None) -> None:
        """Take in a version as the one that `on_live` evaluations score from now on; raises as `read` does."""
        live = self.read(directory)
        with self._shadow_in_place():
            self._stand_in = live

    def save_adapter(self, directory: Path | str, base_model: str) -> None:
        """Write the adapter in PEFT's format, which vLLM loads unchanged; AdapterError if it cannot be written.

        Nothing is flushed, for inference would wait: who keeps the directory does that (`AdapterRegistry.commit`).
        """
        directory = Path(directory)
        fields = self._model.lora_config.to_dict()
        fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
        fields |= {"base_model_name_or_path": base_model, "inference_mode": True}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with self._shadow_in_place():
                save_file(self.tensors(), directory / _WEIGHTS_FILE, metadata={"format": "pt"})
            text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
            (directory / _CONFIG_FILE).write_text(text, encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"adapter cannot be written to {directory}: {error}") from error

    def load_adapter(self, directory: Path | str | None) -> None:
        """Take the parameters from a PEFT directory, or the seeded start; the optimizer starts afresh.

        Raises as `read` does; the adapter is then unchanged.
        """
        if directory is None:
            with self._shadow_in_place():
                self.reset()
            return
        flat = self.read(directory)
        with self._shadow_in_place(), training_mode(self._model.device):
            self._flat.copy_(flat)
            self._clear_optimizer()

    def read(self, directory: Path | str | None) -> torch.Tensor:
        """Read the parameters of a PEFT directory, or zeros for the bare base model, as a flat tensor for `exchange`.

        Raises:
            DamagedAdapterError: Files are missing or unreadable, or rank, alpha, names or shapes differ.
        """
        with training_mode(self._model.device):
            flat = torch.zeros_like(self._flat)
        if directory is None:
            return flat
        directory = Path(directory)
        try:
            fields: dict[str, Any] = json.loads((directory / _CONFIG_FILE).read_text(encoding="utf-8"))
            tensors = load_file(directory / _WEIGHTS_FILE)
        except (OSError, ValueError, SafetensorError) as error:
            raise DamagedAdapterError(f"adapter {directory.name} cannot be read: {error}") from error
        lora = self._model.lora
        if (fields.get("r"), fields.get("lora_alpha")) != (lora.rank, lora.alpha):
            raise DamagedAdapterError(
                f"adapter {directory.name} has rank {fields.get('r')} and alpha {fields.get('lora_alpha')}, "
                f"configured are {lora.rank} and {lora.alpha}"
            )
        check_tensors(tensors, {name: p.shape for name, p in self._parameters.items()}, directory.name)
        with training_mode(self._model.device):
            for name, view in self.named_views(flat).items():
                view.copy_(tensors[name])
        return flat

    def keep(self, checkpoint: Checkpoint) -> None:
        """Copy the state after a step and have it written; failures are kept for the next result."""
        try:
            state = self.checkpoint()
        except RuntimeError as error:
            self.checkpoints.note_error(f"{type(error).__name__}: {error}")
        else:
            self.checkpoints.submit(Path(checkpoint.path), state, checkpoint.progress)

    def save_training_state(self, path: Path | str, progress: dict[str, Any]) -> bool:
        """Have parameters, optimizer, random numbers and progress written; to be called until it says that they are.

        Nothing waits for the disk here, for inference would wait too. An older state on its way is written first.

        Raises:
            AdapterError: The file cannot be written; an older one at `path` is intact.
        """
        if self.checkpoints.is_writing():
            return False
        if self._saving != (str(path), progress):
            self.checkpoints.take_error()  # an older state's, and logged
            with self._shadow_in_place():
                self.checkpoints.submit(Path(path), self.checkpoint(), progress)
            self._saving = str(path), progress
            return False
        self._saving = None
        if (error := self.checkpoints.take_error()) is not None:
            raise AdapterError(error)
        return True

    def load_training_state(self, path: Path | str) -> dict[str, Any] | None:
        """Restore what a step or `save_training_state` wrote and return the progress; None without a usable file."""
        path = Path(path)
        self.checkpoints.wait(_DISK_PATIENCE_S)
        remove_partial_files(path)
        if not path.exists():
            return None
        try:
            state, progress = read_training_state(path)
            with self._shadow_in_place():
                self.restore(state)
        except DamagedAdapterError as error:
            logger.warning("training state ignored: %s", error)
            return None
        return progress

    @contextmanager
    def _shadow_in_place(self) -> Iterator[None]:
        stood_in = self._live_stands_in
        self.put_shadow_back()
        try:
            yield
        finally:
            if stood_in:
                self.put_live_in()

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(flat, [p.numel() for p in self._parameters.values()])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters.values(), strict=True)]

    def _layout(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self._parameters.items()}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a `TrainingState` as they are in use, not copied."""
        return self._optimizer.tensors()

    def _copy(self) -> TrainingState:
        """A copy that equals parameters and optimizer: the latest one, or one made in memory that nobody reads.

        While the disk hangs, both may be on their way to it. Then the one that waits is given up for a newer one.
        """
        if self._latest is None:
            free = None
            while free is None:  # the writer may end, or take up the one that waits, at any moment
                unread = (copy for copy in self._copies if not copy.is_leased)
                free = next(unread, None) or self.checkpoints.take_back()
            for name, tensor in self.state_tensors().items():
                free.tensors[name].copy_(tensor)
            free.num_steps = self.num_steps
            self._latest = free
        return self._latest

    def _empty_copy(self) -> TrainingState:
        return TrainingState(self._optimizer.empty_tensors(self._copies_device), 0, self._layout())

    def _put_back(self, copy: TrainingState) -> None:
        for name, tensor in self.state_tensors().items():
            tensor.copy_(copy.tensors[name])
        self._optimizer.give_out()
        self._latest = copy

    def _check_finite(self) -> None:
        """A bound of each tensor is not finite if one of its values is not; one wait for the device."""
        bounds = [bound for tensor in self.state_tensors().values() for bound in tensor.aminmax()]
        if not bool(torch.stack(bounds).isfinite().all()):
            raise DivergedError("a parameter or its moments are not finite after the optimizer step")

    def _clear_optimizer(self) -> None:
        """The parameters are new: the optimizer forgets all."""
        self.num_steps, self._latest = 0, None
        self._optimizer.take_in()
        self._optimizer.forget()
