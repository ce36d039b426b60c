"""One engine iteration, as planned, as scheduled and as measured. Shared by scheduler, profiler, simulator and engine.

The planner makes a `Plan`. It rides in the engine's directive to the worker, and with the measurements it is one
`IterationSample`, which logs, profiles, monitors and the simulator take as it is. Built-in types only, so that it
crosses process borders; units are in the names.
"""

from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, Literal

from core.types import SliceKind, SliceReport, SliceTiming

PruneReason = Literal["", "always", "decode", "prefill", "finetune"]
"""The reason for dropping KV blocks; the first of these if there are several."""


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

    def with_chunk(self, num_tokens: int, start: int) -> "ForwardShape":
        """A copy with one more chunk."""
        shape = ForwardShape(*_SHAPE_ROW(self))
        shape.add_chunk(num_tokens, start)
        return shape


@dataclass(slots=True)
class Plan:
    """The limits of an iteration. The first two fields hold for inference, the others for fine-tuning and memory."""

    token_budget: int = 0
    """Tokens (decode and prefill) that the forward pass may take; 0 in a blocking training phase."""
    max_chunk_tokens: int = 0
    """Longest prefill chunk of one request; 0: no limit beyond the budget."""
    finetune_budget_s: float = 0.0
    """Slices run while their upper estimate fits into this."""
    min_slices: int = 0
    """Slices that run even if their estimate does not fit."""
    slice_tokens: int = 0
    """Padded tokens that a micro-batch started from now on may have; 0: as configured."""
    prune_blocks: int = 0
    """KV blocks to drop before this iteration is scheduled."""
    prune_reason: PruneReason = ""
    wants_prune_scores: bool = False
    """Memory is getting short: blocks should be scored with this forward pass."""
    reserves_arena: bool = False
    """Memory for the slices' step is reserved in the ledger, until a report says that nothing is held."""
    defers_training: bool = False
    """Memory is short even with all that may be dropped: no slices, unless they have waited too long."""
    is_blocking: bool = False
    """Slices run to the end of the current step without inference (policies `periodic` and `continuous`)."""
    predicted_forward_s: float | None = None
    gap_correction_s: float = 0.0
    """Time that training and prompts do without, because clients saw gaps above the target."""
    first_token_share: float = 1.0
    """Share of the slack that training may use, because clients waited too long for first tokens."""

    @property
    def runs_slices(self) -> bool:
        """Slices may run in this iteration."""
        return self.has_to_run_slices or self.finetune_budget_s > 0

    @property
    def has_to_run_slices(self) -> bool:
        """At least one slice runs, however little time there is."""
        return self.is_blocking or self.min_slices > 0

    def without_slices(self) -> "Plan":
        """The same for inference and memory; slices have to wait for another iteration."""
        return replace(self, finetune_budget_s=0.0, min_slices=0, is_blocking=False)


@dataclass(frozen=True, slots=True)
class EdgeReport:
    """What clients saw since the last report, measured where answers leave the server."""

    num_gaps: int = 0
    """Gaps between the chunks of streams."""
    num_late_gaps: int = 0
    """Those above the TBT target."""
    gap_p99_s: float = 0.0
    num_first: int = 0
    """First chunks of interactive streams."""
    num_late_first: int = 0
    """Those above the TTFT target."""


@dataclass(slots=True)
class IterationSample:
    """One measured engine iteration and the plan that it ran under."""

    shape: ForwardShape
    forward_s: float
    """Inference forward pass and sampling; near zero if `shape` is empty."""
    overhead_s: float = 0.0
    """Wall time that was neither forward pass nor slices: scheduling, message passing."""
    report: SliceReport = field(default_factory=SliceReport)
    plan: Plan = field(default_factory=Plan)

    @property
    def slices_s(self) -> float:
        """Time of all slices."""
        return sum(timing.latency_s for timing in self.report.slices)

    def to_wire(self) -> list[Any]:
        """Built-in types without names: thousands cross process borders while tokens wait.

        Results of tasks that ended are left out: they travel with their requests.
        """
        report = self.report
        slices = [(timing.kind.value, timing.num_tokens, timing.latency_s) for timing in report.slices]
        rows = (slices, _REPORT_ROW(report), _PLAN_ROW(self.plan))
        return [_SHAPE_ROW(self.shape), self.forward_s, self.overhead_s, *rows]

    @classmethod
    def from_wire(cls, data: list[Any]) -> "IterationSample":
        """Inverse of `to_wire`."""
        shape, forward_s, overhead_s, timings, report, plan = data
        slices = [SliceTiming(SliceKind(kind), num_tokens, latency_s) for kind, num_tokens, latency_s in timings]
        return cls(ForwardShape(*shape), forward_s, overhead_s, SliceReport(slices, [], *report), Plan(*plan))


_SHAPE_ROW = attrgetter(*(f.name for f in fields(ForwardShape)))
_PLAN_ROW = attrgetter(*(f.name for f in fields(Plan)))
_REPORT_ROW = attrgetter(*(f.name for f in fields(SliceReport) if f.name not in ("slices", "finished")))
