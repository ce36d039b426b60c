"""What the client saw of one run, before any statistics. Times are seconds since the measuring window began."""

from dataclasses import dataclass, field

from core.batch import IterationSample


@dataclass(slots=True)
class RequestRecord:
    """One inference request."""

    request_id: str
    scheduled_s: float
    """When the trace says that it arrives; TTFT counts from here, however late it was sent."""
    num_prompt_tokens: int
    num_output_tokens: int
    """As asked for."""
    sent_s: float | None = None
    first_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    """Between tokens. Of k tokens that came in one output the first has the whole gap, the others 0."""
    num_merged_tokens: int = 0
    """Tokens that came in one output with an earlier one."""
    finished_s: float | None = None
    error: str | None = None
    """Set exactly if the request did not end with all its tokens."""

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, queueing and lateness of the client included."""
        return None if self.first_token_s is None else self.first_token_s - self.scheduled_s


@dataclass(slots=True)
class TaskRecord:
    """One fine-tune step that ended while the client watched, in or after the window."""

    task_id: str
    num_pairs: int
    finished_s: float = 0.0
    busy_s: float = 0.0
    """Device time of its slices."""
    longest_slice_s: float = 0.0
    error: str | None = None


@dataclass(slots=True)
class IterationLog:
    """The engine's iterations during the window."""

    samples: list[IterationSample] = field(default_factory=list)
    covered_s: float = 0.0
    """Wall time that the samples stand for: between the engine's answers that open and close the window."""
    num_lost: int = 0
    """Iterations that the engine had forgotten when it was asked."""


@dataclass(slots=True)
class RunRecord:
    """One measuring window."""

    window_s: float
    requests: list[RequestRecord] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)
    iterations: IterationLog = field(default_factory=IterationLog)
