"""A device with known costs, behind the `LatencyPredictor` port."""

from core.batch import ForwardShape
from core.config import AppArgs, ExperimentsConfig, KvPruningConfig, SchedulerConfig, SloConfig
from core.types import SliceKind
from scheduler.iteration.planner import EngineLimits, IterationPlanner
from scheduler.priority import BASE_DECODE, BASE_FINETUNE, RATE_FINETUNE


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


STARVATION_BOUND_S = (BASE_DECODE - BASE_FINETUNE) / RATE_FINETUNE
"""Longest time that fine-tune work goes without a slice while inference is saturated, with ageing."""


def settings(*, slo=None, pruning=None, **changes) -> AppArgs:
    """`changes` are keys of `scheduler` and of `experiments`."""
    scheduler = {key: value for key, value in changes.items() if key in SchedulerConfig.model_fields}
    experiments = {key: value for key, value in changes.items() if key not in scheduler}
    return AppArgs(
        scheduler=SchedulerConfig(**scheduler),
        experiments=ExperimentsConfig(**experiments),
        slo=slo or SloConfig(ttft_s=1.0, tbt_s=0.1),
        kv_pruning=pruning or KvPruningConfig(),
    )


def make_planner(device=None, *, limits=None, kv_bytes=1 << 20, arena_bytes=1 << 20, **changes):
    limits = {"max_tokens": 2048, "kv_bytes": kv_bytes, "arena_bytes": arena_bytes, **(limits or {})}
    return IterationPlanner(settings(**changes), device or KnownDevice(), EngineLimits(**limits))
