"""AdamW on the flat buffer of a LoRA, where the buffer is or on another device.

Elsewhere there is a master copy of the parameters, the moments and a buffer for gradients, on the CPU in pinned memory
so that the GPU reads and writes it directly. A step takes the gradients there, and `give_out` brings the parameters
back. The arithmetic is the same fused kernel, element by element: on two devices results differ by rounding only, on
the same one not at all.
"""

import torch

from core.config import TrainingConfig


class FlatAdamW:
    """Owner of the moments, and of the master copy if there is one. Callers set the grad mode (`training_mode`)."""

    def __init__(self, flat: torch.Tensor, config: TrainingConfig, device: torch.device | None = None) -> None:
        """`device` None works on `flat` itself; else parameters, moments and arithmetic are on that device."""
        self._flat = flat
        self.is_elsewhere = device is not None
        """Parameters and moments that are trained are a copy of their own."""
        master, self._gradients = flat, None
        if device is not None:
            master, self._gradients = (_empty_like(flat, device) for _ in range(2))
            master.copy_(flat)
        self._master = torch.nn.Parameter(master)
        self._optimizer = torch.optim.AdamW(
            [self._master], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.forget()

    def tensors(self) -> dict[str, torch.Tensor]:
        """`flat`, `step`, `exp_avg` and `exp_avg_sq` as they are in use, not copied."""
        return {"flat": self._master.detach(), **self._optimizer.state[self._master]}

    def empty_tensors(self, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """Room for a copy of `tensors`, where they are or on another device."""
        return {name: _empty_like(tensor, device or tensor.device) for name, tensor in self.tensors().items()}

    def step(self, gradients: torch.Tensor) -> None:
        """One AdamW step on the trained parameters; `give_out` shows it to the model."""
        if self._gradients is not None:
            gradients = self._gradients.copy_(gradients)
        self._master.grad = gradients
        try:
            self._optimizer.step()
        finally:
            self._master.grad = None

    def forget(self) -> None:
        """Zero moments, made now: the first step then allocates nothing and takes no longer than the others."""
        self._optimizer.state[self._master] = {
            "step": torch.zeros((), dtype=torch.float32, device=self._master.device),
            "exp_avg": torch.zeros_like(self._master, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(self._master, requires_grad=False),
        }

    def take_in(self) -> None:
        """The model's parameters were set from outside: train these from now on."""
        if self.is_elsewhere:
            self._master.detach().copy_(self._flat)

    def give_out(self) -> None:
        """Give the model the trained parameters."""
        if self.is_elsewhere:
            self._flat.copy_(self._master.detach())


def _empty_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Room for a tensor; pinned if it is CPU memory for what a GPU holds."""
    is_pinned = tensor.is_cuda and device.type == "cpu"
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=is_pinned)
