"""What lives between two slices of a DPO step: the description of a slice, and one micro-batch's tensors."""

from dataclasses import dataclass, field

import torch

from core.errors import TrainingError
from core.types import SliceKind
from engine.training.dpo_batch import MicroBatch


@dataclass(frozen=True, slots=True)
class SliceSpec:
    """What a slice will do."""

    kind: SliceKind
    num_tokens: int
    """Tokens for embedding and layers, padding included, completion tokens for head and loss, 0 for the optimizer."""


@dataclass(slots=True)
class Work:
    """What is alive of one micro-batch. Shapes as in `MicroBatch`; hidden states in the model's dtype."""

    batch: MicroBatch
    hidden: torch.Tensor | None = None
    """[2n, T, H] or [1, N, H]; after a last layer the scored positions [C, H]; in backward the gradient, as before."""
    inputs: list[torch.Tensor] = field(default_factory=list)
    """Kept layer inputs, popped by backward."""
    reference: list[torch.Tensor] = field(default_factory=list)
    """Token log-probabilities per head chunk."""
    policy: list[torch.Tensor] = field(default_factory=list)
    head_grads: list[torch.Tensor] = field(default_factory=list)
    """d logp / d hidden per head chunk, [c, H]."""

    def state(self) -> torch.Tensor:
        """The hidden state that the slice before has left.

        Raises:
            TrainingError: There is none.
        """
        if self.hidden is None:
            raise TrainingError("slices ran out of order")
        return self.hidden

    def num_bytes(self) -> int:
        """Device memory held."""
        held = [*self.inputs, *self.reference, *self.policy, *self.head_grads]
        return sum(tensor.nbytes for tensor in held) + (0 if self.hidden is None else self.hidden.nbytes)
