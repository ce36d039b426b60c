"""What a simulated executor is made of: a device, its memory, and what the planner knows of it at the start."""

from collections.abc import Callable
from dataclasses import dataclass

from core.batch import ForwardShape, IterationSample
from core.dpo_slices import StepModel
from core.model_dims import ModelDims
from core.ports import LatencyPredictor
from core.types import SliceKind
from simulator.device import DeviceModel


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of executor; all executors of a run are alike."""

    device: DeviceModel
    """The truth."""
    new_predictor: Callable[[], LatencyPredictor]
    """What production would start from: one for each executor, because it learns."""
    step_model: StepModel
    kv_tokens: int
    kv_bytes_per_token: float
    arena_bytes: int
    arena_bytes_per_token: float
    arena_fixed_bytes: float = 0.0
    dims: ModelDims | None = None
    """Of the model in training; None: the planner knows only the profile's memory."""
    block_tokens: int = 1
    """Tokens of a KV block; `kv_tokens` are rounded down to whole blocks."""


class FrozenPredictor:
    """A predictor that learns nothing: the profile as it was measured, whatever the device does now."""

    def __init__(self, predictor: LatencyPredictor) -> None:
        self._predictor = predictor

    @property
    def overhead_s(self) -> float:
        """As at the start."""
        return self._predictor.overhead_s

    def forward_s(self, shape: ForwardShape) -> float | None:
        """As at the start."""
        return self._predictor.forward_s(shape)

    def forward_upper_s(self, shape: ForwardShape) -> float | None:
        """As at the start."""
        return self._predictor.forward_upper_s(shape)

    def slice_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """As at the start."""
        return self._predictor.slice_s(kind, num_tokens)

    def slice_upper_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """As at the start."""
        return self._predictor.slice_upper_s(kind, num_tokens)

    def observe(self, sample: IterationSample) -> None:
        """Nothing is learnt."""
