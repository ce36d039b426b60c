"""What one engine iteration consists of, and what it was measured to cost. Shared by scheduler, profiler,
simulator and engine; built-in types only, so that it crosses process borders."""

from dataclasses import dataclass, field
from typing import Any

from core.types import SliceKind, SliceTiming


@dataclass(slots=True)
class ForwardShape:
    """The features of an inference forward pass that decide its latency."""

    num_decode: int = 0
    """Requests that get one token each."""
    decode_context: int = 0
    """Tokens of KV cache that those requests attend to, summed."""
    num_prefill_tokens: int = 0
    """Prompt tokens computed in this pass, over all chunks."""
    prefill_attention: int = 0
    """Sum over chunks of chunk * (start + chunk / 2): the query-key pairs of causal attention."""
    num_prefills: int = 0
    """Chunks."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass."""
        return self.num_decode + self.num_prefill_tokens

    def add_chunk(self, num_tokens: int, start: int) -> None:
        """Add one prefill chunk that begins at position `start` of its prompt."""
        self.num_prefill_tokens += num_tokens
        self.prefill_attention += num_tokens * (2 * start + num_tokens) // 2
        self.num_prefills += 1


@dataclass(slots=True)
class IterationSample:
    """One measured engine iteration, with what had been predicted for it."""

    shape: ForwardShape
    forward_s: float
    """Inference forward pass and sampling; near zero if `shape` is empty."""
    overhead_s: float = 0.0
    """Wall time that was neither forward pass nor slices: scheduling, message passing."""
    slices: list[SliceTiming] = field(default_factory=list)
    predicted_forward_s: float | None = None
    finetune_budget_s: float = 0.0
    held_bytes: int = 0
    """Arena memory of the step in progress after the iteration."""
    peak_bytes: int = 0
    """Most that it held between two slices of the iteration."""
    out_of_memory: bool = False
    """A slice of this iteration ran out of device memory."""

    @property
    def slices_s(self) -> float:
        """Time of all slices."""
        return sum(timing.latency_s for timing in self.slices)

    def to_wire(self) -> list[Any]:
        """Built-in types only, without names: thousands cross process borders while tokens wait."""
        shape = self.shape
        return [
            [
                shape.num_decode,
                shape.decode_context,
                shape.num_prefill_tokens,
                shape.prefill_attention,
                shape.num_prefills,
            ],
            self.forward_s,
            self.overhead_s,
            [(timing.kind.value, timing.num_tokens, timing.latency_s) for timing in self.slices],
            self.predicted_forward_s,
            self.finetune_budget_s,
            self.held_bytes,
            self.peak_bytes,
            self.out_of_memory,
        ]

    @classmethod
    def from_wire(cls, data: list[Any]) -> "IterationSample":
        """Inverse of `to_wire`."""
        shape, forward_s, overhead_s, slices, *rest = data
        timings = [SliceTiming(SliceKind(kind), num_tokens, latency_s) for kind, num_tokens, latency_s in slices]
        return cls(ForwardShape(*shape), forward_s, overhead_s, timings, *rest)
