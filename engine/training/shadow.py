"""The adapter in training: LoRA matrices and AdamW's state, with snapshots, PEFT export and a resumable file.

All LoRA matrices of the model are views of one flat fp32 buffer, layer after layer. Gradient norm, AdamW and
snapshots are then one operation each instead of one per matrix (336 of them for 24 layers).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core.config import TrainingConfig
from core.errors import AdapterError, DamagedAdapterError, DivergedError
from core.files import atomic_file, write_atomically
from engine.training.skeleton import training_mode
from engine.training.trainable import TrainableModel
from engine.training.training_state import (
    TrainingState,
    check_tensors,
    random_state,
    read_training_state,
    set_random_state,
    write_training_state,
)

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"


class ShadowAdapter:
    """Owner of the model's LoRA and of its optimizer. One per `TrainableModel`; not thread-safe."""

    def __init__(self, model: TrainableModel, config: TrainingConfig) -> None:
        self._model = model
        self._config = config
        self._parameters = model.lora_parameters()
        self.num_steps = 0
        """Optimizer steps since the last reset or load."""
        self._copies: list[TrainingState] = []
        self._latest: TrainingState | None = None
        """The copy that equals parameters and optimizer as they are, if one does."""
        with training_mode(model.device):
            self._flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in self._parameters.values()]))
            for parameter, view in zip(self._parameters.values(), self._views(self._flat.detach()), strict=True):
                parameter.data = view
            self._optimizer = torch.optim.AdamW(
                [self._flat], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
            )
            self._clear_optimizer()

    @property
    def num_parameters(self) -> int:
        """Trained numbers; training state is 12 bytes each and its copy as many, gradients 4 more in a step."""
        return self._flat.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The LoRA matrices by PEFT name, copied to the CPU."""
        with training_mode(self._model.device):
            copy = self._flat.detach().to("cpu", copy=True)
            return dict(zip(self._parameters, self._views(copy), strict=True))

    def new_gradients(self) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """A zeroed flat gradient buffer and, per layer, its views in the order of `layer_parameters`."""
        flat = torch.zeros_like(self._flat, requires_grad=False)
        views = iter(self._views(flat))
        return flat, [
            [next(views) for _ in self._model.layer_parameters(i)] for i in range(self._model.num_layers)
        ]

    def named_views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat buffer as matrices by PEFT name."""
        return dict(zip(self._parameters, self._views(flat), strict=True))

    def apply(self, gradients: torch.Tensor) -> float:
        """Clip the flat gradients (in place) and take one AdamW step.

        Returns:
            The gradient norm before clipping.

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
                self._flat.grad = gradients
                self._optimizer.step()
                self._check_finite()
            except BaseException:
                self._put_back(before)
                raise
            finally:
                self._flat.grad = None
        self.num_steps += 1
        return norm

    def checkpoint(self) -> TrainingState:
        """A copy on the device of everything that `load_training_state` needs.

        It stays as it is while it `is_leased`. The next step uses it as the state to go back to, so that a checkpoint
        after each step costs no copy more than none.
        """
        with training_mode(self._model.device):
            state = self._copy()
            state.rng = random_state(self._model.device)
            return state

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Everything that `restore` needs, on the CPU: parameters, AdamW moments, step count."""
        with training_mode(self._model.device):
            state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._state().items()}
            return {**state, "num_steps": torch.tensor(self.num_steps, device="cpu")}

    def restore(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        """Back to a snapshot of this adapter, bit for bit."""
        with training_mode(self._model.device):
            for name, tensor in self._state().items():
                tensor.detach().copy_(snapshot[name])
        self.num_steps, self._latest = int(snapshot["num_steps"]), None

    def reset(self) -> None:
        """Back to the seeded start: B is zero, so the model is the base model. The optimizer forgets all."""
        with training_mode(self._model.device):
            self._model.reset_lora(self._config.seed)
            self._clear_optimizer()

    def save(self, directory: Path | str, base_model: str) -> None:
        """Write the adapter in PEFT's format; `PeftModel.from_pretrained` and vLLM load it unchanged.

        Raises:
            AdapterError: The directory cannot be written.
        """
        directory = Path(directory)
        fields = self._model.lora_config.to_dict()
        fields["target_modules"] = sorted(fields["target_modules"])
        fields |= {"base_model_name_or_path": base_model, "inference_mode": True}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with atomic_file(directory / _WEIGHTS_FILE) as path:
                save_file(self.tensors(), path, metadata={"format": "pt"})
            write_atomically(directory / _CONFIG_FILE, json.dumps(fields, indent=2, sort_keys=True) + "\n")
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"adapter cannot be written to {directory}: {error}") from error

    def load(self, directory: Path | str) -> None:
        """Take the parameters from a PEFT directory; the optimizer starts afresh.

        Raises:
            DamagedAdapterError: Files are missing or unreadable, or rank, alpha, names or shapes differ.
        """
        flat = self.read(directory)
        with training_mode(self._model.device):
            self._flat.detach().copy_(flat)
            self._clear_optimizer()

    def read(self, directory: Path | str) -> torch.Tensor:
        """The parameters of a PEFT directory as a flat tensor for `exchange`; this adapter is unchanged.

        Raises:
            DamagedAdapterError: Files are missing or unreadable, or rank, alpha, names or shapes differ.
        """
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
            flat = torch.empty_like(self._flat, requires_grad=False)
            for view, name in zip(self._views(flat), self._parameters, strict=True):
                view.copy_(tensors[name])
            return flat

    def zeros(self) -> torch.Tensor:
        """A flat tensor for `exchange` under which the model is the bare base model."""
        with training_mode(self._model.device):
            return torch.zeros_like(self._flat, requires_grad=False)

    def exchange(self, flat: torch.Tensor) -> None:
        """Swap the parameters with those in `flat`, in place; optimizer state stays. Twice is no change."""
        with training_mode(self._model.device):
            mine = self._flat.detach().clone()
            self._flat.detach().copy_(flat)
            flat.copy_(mine)

    def save_training_state(self, path: Path | str, progress: dict[str, Any] | None = None) -> None:
        """Write parameters, optimizer, random numbers and progress atomically, now.

        Raises:
            AdapterError: The file cannot be written; an older one at `path` is intact.
        """
        with training_mode(self._model.device):
            random = random_state(self._model.device)
        state = TrainingState(self._state(), self.num_steps, self._layout(), random)
        write_training_state(Path(path), state, progress or {})

    def load_training_state(self, path: Path | str) -> dict[str, Any]:
        """Inverse of `save_training_state`, returns the progress; further steps are bit-equal to an uninterrupted run.

        Raises:
            DamagedAdapterError: The file is missing, unreadable, or of another LoRA shape; nothing changed.
        """
        name = Path(path).name
        state, progress = read_training_state(Path(path))
        if state.shapes != self._layout():
            raise DamagedAdapterError(f"training state {name} belongs to another model or LoRA shape")
        check_tensors(state.tensors, {key: tensor.shape for key, tensor in self._state().items()}, name)
        self.restore({**state.tensors, "num_steps": torch.tensor(state.num_steps)})
        set_random_state(state.rng, self._model.device)
        return progress

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(flat, [p.numel() for p in self._parameters.values()])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters.values(), strict=True)]

    def _layout(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self._parameters.items()}

    def _state(self) -> dict[str, torch.Tensor]:
        """The live tensors of a `TrainingState`."""
        return {"flat": self._flat.detach(), **self._optimizer.state[self._flat]}

    def _copy(self) -> TrainingState:
        """A copy that equals parameters and optimizer: the latest one, or a new one in memory that nobody reads."""
        if self._latest is None:
            live = self._state()
            free = next((copy for copy in self._copies if not copy.is_leased), None)
            if free is None:
                empty = {name: torch.empty_like(tensor) for name, tensor in live.items()}
                free = TrainingState(empty, 0, self._layout())
                self._copies.append(free)
            for name, tensor in live.items():
                free.tensors[name].copy_(tensor)
            free.num_steps = self.num_steps
            self._latest = free
        return self._latest

    def _put_back(self, copy: TrainingState) -> None:
        for name, tensor in self._state().items():
            tensor.copy_(copy.tensors[name])
        self._latest = copy

    def _check_finite(self) -> None:
        """A bound of each tensor is not finite if one of its values is not; one wait for the device."""
        bounds = [bound for tensor in self._state().values() for bound in tensor.aminmax()]
        if not bool(torch.stack(bounds).isfinite().all()):
            raise DivergedError("a parameter or its moments are not finite after the optimizer step")

    def _clear_optimizer(self) -> None:
        """Zero moments, made now: the first step then allocates nothing and takes no longer than the others."""
        self.num_steps, self._latest = 0, None
        self._optimizer.state[self._flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=self._flat.device),
            "exp_avg": torch.zeros_like(self._flat, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(self._flat, requires_grad=False),
        }
