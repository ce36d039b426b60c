"""What one engine iteration may spend on fine-tuning: state in, `Plan` out.

The rule: inference is scheduled first; slices then fill the time that is predicted to be left before the
TBT target of the running requests and the TTFT target of the waiting ones. The worker runs a slice only if
its own upper estimate still fits into what is left, so the longest slice bounds the delay of inference.
Pure: no clock, no device; `observe` feeds measurements back.
"""

from dataclasses import dataclass

from core.config import SchedulerConfig, SloConfig
from scheduler.estimator import ForwardEstimator

IDLE_QUANTUM_S = 0.01
"""With nothing to serve, slices run for this long (at least one) before new requests are looked for."""

_OVERHEAD_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class IterationState:
    """What the engine is about to run, apart from fine-tuning."""

    num_decode_tokens: int
    num_prefill_tokens: int
    oldest_first_token_wait_s: float | None
    """How long the longest-waiting request without a first token has waited; None if there is none."""
    has_finetune_work: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the inference forward pass."""
        return self.num_decode_tokens + self.num_prefill_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """The fine-tune part of one iteration."""

    finetune_budget_s: float
    min_slices: int
    """Slices that run even if their estimate does not fit: one when the engine is idle, else none."""
    predicted_forward_s: float | None


class IterationPlanner:
    """Turns SLOs and measured latencies into each iteration's fine-tune budget."""

    def __init__(self, config: SchedulerConfig, slo: SloConfig) -> None:
        self._config = config
        self._slo = slo
        self._forward = ForwardEstimator()
        self._overhead_s = 0.0

    def plan(self, state: IterationState) -> Plan:
        """Budget in seconds for the slices of this iteration; zero without fine-tune work."""
        predicted_s = self._forward.predict(state.num_tokens) if state.num_tokens else 0.0
        if not state.has_finetune_work or self._config.policy == "inference_only":
            return Plan(0.0, 0, predicted_s)
        if state.num_tokens == 0:
            return Plan(IDLE_QUANTUM_S, 1, predicted_s)
        if predicted_s is None:  # nothing measured yet: measure the forward pass alone first
            return Plan(0.0, 0, None)
        return Plan(max(0.0, self._slack_s(state, predicted_s)), 0, predicted_s)

    def observe(self, num_tokens: int, forward_s: float, overhead_s: float) -> None:
        """Feed back one iteration: its forward time and what it spent on neither forward nor slices."""
        if num_tokens:
            self._forward.observe(num_tokens, forward_s)
            self._overhead_s += _OVERHEAD_SMOOTHING * (overhead_s - self._overhead_s)

    def _slack_s(self, state: IterationState, predicted_s: float) -> float:
        busy_s = predicted_s + self._overhead_s
        slack_s = self._config.slack_fraction * self._slo.tbt_s - busy_s
        if state.oldest_first_token_wait_s is not None:
            first_token_s = self._slo.ttft_s - state.oldest_first_token_wait_s - busy_s
            slack_s = min(slack_s, self._config.slack_fraction * first_token_s)
        return slack_s
