"""The messages between the hybrid scheduler and its worker inside an engine.

Both ride as attributes on vLLM's own objects, which are plain dataclasses and are pickled whole between the
two processes: a `Directive` on `SchedulerOutput`, an `IterationReport` on a copy of `ModelRunnerOutput`.
"""

from dataclasses import dataclass, field
from typing import Any

from core.batch import ForwardShape, Plan
from core.types import SliceReport, SliceTiming

TASK_KEY = "mace_finetune_task"
"""Key in `SamplingParams.extra_args` that carries a task. Only code inside the replica may set it."""

CLIENT_KEY = "mace_client"
"""Key in `SamplingParams.extra_args` that says who sent a request (`engine.vllm.requests.CLIENT`)."""

NOTE_KEY = "mace_note"
"""Key in `SamplingParams.extra_args` of a request that is none: what it carries is for the scheduler alone."""

DIRECTIVE_ATTRIBUTE = "mace_directive"
REPORT_ATTRIBUTE = "mace_report"


@dataclass(slots=True)
class MemoryCounters:
    """KV memory as the scheduler sees it, and what happened to it since the start."""

    num_blocks: int = 0
    """KV blocks that can be given out."""
    free_blocks: int = 0
    """Those that nobody holds; the prefix cache may still know what is in them."""
    pruned_blocks: int = 0
    pruned_requests: int = 0
    preemptions: int = 0
    arena_capacity_bytes: int = 0
    arena_used_bytes: int = 0
    entries: dict[str, int] = field(default_factory=dict)
    """Bytes beside KV cache and arena by what they are for (`MemoryLedger.entries`)."""
    ledger_error: str | None = None
    """The finding of `MemoryLedger.check_integrity`; None if the books balance."""


@dataclass(slots=True)
class Directive:
    """Scheduler to worker, once per iteration."""

    plan: Plan = field(default_factory=Plan)
    shape: ForwardShape = field(default_factory=ForwardShape)
    """The forward pass that was scheduled under the plan."""
    new_tasks: list[dict[str, Any]] = field(default_factory=list)
    """`FineTuneTask.to_wire()` of tasks that entered since the last iteration."""
    aborted_task_ids: list[str] = field(default_factory=list)
    dropped_blocks: dict[str, list[int]] = field(default_factory=dict)
    """KV blocks that are given up from this forward pass on: positions in the row by request id."""
    score_request_ids: list[str] = field(default_factory=list)
    """Requests whose KV blocks are to be scored."""
    memory: MemoryCounters = field(default_factory=MemoryCounters)
    num_arrived: int = 0
    """Requests that had been sent to the engine when the iteration before was scheduled (`engine.vllm.arrivals`): those
    that came since wait for this one, and end its slices."""
    epoch: int = 0
    """Counts the times that all requests were sent back after a failure (`engine.vllm.recovery`)."""
    started_s: float = 0.0
    """When the iteration began, as `time.perf_counter` of the scheduler's process."""
    overhead_s: float = 0.0
    """Overhead of the newest iteration whose output had come; that of this one is known when it is over."""


@dataclass(slots=True)
class WorkerFacts:
    """Measurements of the worker from before the first iteration."""

    warm_up: list[SliceTiming]
    """Every kind of slice, measured once."""
    free_bytes: int
    """Device memory that could still be allocated, once the engine is ready to serve."""
    kept: dict[str, int] = field(default_factory=dict)
    """Bytes of that which are not for training, by what takes them back (`MemoryLedger.note_device`)."""
    held: dict[str, int] = field(default_factory=dict)
    """Bytes that MACE holds beside weights and KV cache, by what for."""


@dataclass(slots=True)
class IterationReport:
    """Worker to scheduler, once per iteration."""

    finetune: SliceReport
    forward_s: float
    """Inference forward pass and sampling."""
    facts: WorkerFacts | None = None
    """Only the first report has them."""
    kv_scores: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Position and score of full KV blocks, keyed by request id; higher is kept."""
    failure: str | None = None
    """The exception that the forward pass or the sampling raised; the output then holds nothing."""
