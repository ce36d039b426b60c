"""Muon (Jordan et al., 2024) for the weight matrices of the tiny assistant.

Orthogonalised updates learn rare facts in far fewer steps than Adam, which is what fits the build into a minute.
`torch.optim.Muon` iterates in bfloat16, which is slow on CPUs, and one matrix at a time; this one runs in fp32 and
stacks matrices of equal shape.
"""

from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration, from the Muon write-up."""


class Muon:
    """Momentum, then the nearest orthogonal matrix, then a decoupled weight decay."""

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], momentum: float = 0.95, num_iterations: int = 5
    ) -> None:
        groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault(parameter.shape, []).append(parameter)
        self._groups = list(groups.values())
        self._velocities = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        self._momentum = momentum
        self._num_iterations = num_iterations

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float) -> None:
        """Apply one update from the gradients at hand."""
        for group, velocity in zip(self._groups, self._velocities, strict=True):
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            velocity.lerp_(gradient, 1 - self._momentum)
            update = orthogonalise(gradient.lerp(velocity, self._momentum), self._num_iterations)
            rows, columns = velocity.shape[1:]
            scale = learning_rate * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(group, update.unbind(0), strict=True):
                parameter.mul_(1 - learning_rate * weight_decay).sub_(change, alpha=scale)


def orthogonalise(matrices: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """Bring the singular values of each of [K, rows, columns] near 1, keeping the singular vectors."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if is_tall else x
