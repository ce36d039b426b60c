"""What a profile says about a device: latency of forward passes and slices, memory of a fine-tune step.

Every model is linear with coefficients that are not negative, so predictions are monotone in every feature. A linear
form is what the roofline of a transformer gives: reading the weights (constant), work per token (linear), and
attention (proportional to the query-key pairs).
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from core.batch import ForwardShape
from core.types import SliceKind

Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ForwardVector = tuple[float, float, float, float, float, float]

FORWARD_FEATURES = (
    "any_token",
    "num_decode",
    "decode_context",
    "num_prefill_tokens",
    "prefill_attention",
    "num_prefills",
)
"""Names of `forward_features`, in order."""


def forward_features(shape: ForwardShape) -> ForwardVector:
    """The features that forward latency is linear in; the first is 1 if the pass has any token."""
    any_token = 1.0 if shape.num_decode or shape.num_prefill_tokens else 0.0
    return (
        any_token,
        float(shape.num_decode),
        float(shape.decode_context),
        float(shape.num_prefill_tokens),
        float(shape.prefill_attention),
        float(shape.num_prefills),
    )


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class LatencyModel(_Model):
    """Seconds of a forward pass and of each kind of slice."""

    forward: tuple[Coefficient, Coefficient, Coefficient, Coefficient, Coefficient, Coefficient]
    """Seconds for each unit of `FORWARD_FEATURES`."""
    typical: tuple[Coefficient, Coefficient, Coefficient, Coefficient, Coefficient, Coefficient]
    """Largest value of each feature among the samples: how far the fit is supported by measurements."""
    slices: dict[SliceKind, tuple[Coefficient, Coefficient]]
    """Seconds of a slice, and seconds for each of its tokens."""

    def forward_s(self, shape: ForwardShape) -> float:
        """Latency of a forward pass in seconds; 0 for an empty shape."""
        return sum(c * x for c, x in zip(self.forward, forward_features(shape), strict=True))

    def slice_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Latency of one slice in seconds; None for a kind that was not measured."""
        coefficients = self.slices.get(kind)
        return None if coefficients is None else coefficients[0] + coefficients[1] * num_tokens


class MemoryModel(_Model):
    """Bytes that a fine-tune step holds between slices, and bytes of the KV cache."""

    arena_bytes: Coefficient
    """Held whatever the micro-batch: LoRA gradients."""
    arena_bytes_per_token: Coefficient
    """Held for each padded token of a micro-batch: kept layer inputs, head gradients."""
    kv_bytes_per_token: int | None = Field(None, ge=1)
    """KV cache of one token over all layers; known from the model's shape, not fitted. None: unknown."""

    def step_bytes(self, num_tokens: int) -> float:
        """Most memory that a step with micro-batches of `num_tokens` padded tokens holds between slices."""
        return self.arena_bytes + self.arena_bytes_per_token * num_tokens
