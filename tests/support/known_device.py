"""A device with known costs, behind the `LatencyPredictor` port."""

from core.batch import ForwardShape
from core.config import SchedulerConfig, SloConfig
from core.types import SliceKind
from scheduler.iteration.planner import EngineLimits, IterationPlanner
from scheduler.memory.ledger import MemoryLedger


class KnownDevice:
    def __init__(self, *, base_s=0.01, token_s=0.0005, slice_token_s=0.0001, overhead_s=0.001, upper=1.0):
        self.base_s, self.token_s, self.slice_token_s = base_s, token_s, slice_token_s
        self.overhead_s = overhead_s
        self.upper = upper
        self.samples = []

    def forward_s(self, shape: ForwardShape) -> float:
        return self.base_s + self.token_s * shape.num_tokens if shape.num_tokens else 0.0

    def forward_upper_s(self, shape: ForwardShape) -> float:
        return self.upper * self.forward_s(shape)

    def slice_s(self, kind: SliceKind, num_tokens: int) -> float:
        return self.slice_token_s * max(1, num_tokens)

    def slice_upper_s(self, kind: SliceKind, num_tokens: int) -> float:
        return self.upper * self.slice_s(kind, num_tokens)

    def observe(self, sample) -> None:
        self.samples.append(sample)


class UnknownDevice(KnownDevice):
    def forward_s(self, shape):
        return None if shape.num_tokens else 0.0

    forward_upper_s = forward_s

    def slice_s(self, kind, num_tokens):
        return None

    slice_upper_s = slice_s


def make_planner(
    device=None, *, slo=None, kv_bytes=1 << 20, arena_bytes=1 << 20, limits=None, pruning=None, **config
):
    config = SchedulerConfig(**config)
    return IterationPlanner(
        config=config,
        slo=slo or SloConfig(ttft_s=1.0, tbt_s=0.1),
        predictor=device or KnownDevice(),
        limits=limits or EngineLimits(max_tokens=2048, max_slice_tokens=1024),
        memory=MemoryLedger(kv_bytes=kv_bytes, arena_bytes=arena_bytes, tau_mem=config.tau_mem),
        pruning=pruning,
    )
