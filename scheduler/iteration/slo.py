"""The time that the SLO targets leave: seconds that an iteration may last, and seconds of it for fine-tuning.

TBT: every running request waits for the whole iteration, so an iteration of predicted latency above the target
is a miss for all of them. TTFT: a request without its first token waits for this iteration and for those that its
prompt, and the prompts ahead of it, still need; what is left until its target may be spent on fine-tuning.
"""

from core.batch import ForwardShape
from core.config import SchedulerConfig, SloConfig
from core.ports import LatencyPredictor
from core.types import SliceKind
from scheduler.view import IterationView

_UNSERVED_SHARE_OF_TTFT = 0.5
"""If nobody decodes, an iteration may last this share of the TTFT target: a request that arrives just after its
start still has the other half for its own prompt."""

ROOM = 1.5
"""A target of so many times what the device needs without training leaves training a fifth of each iteration."""
SMALLEST_SLICE_TOKENS = 32
"""No micro-batch is made smaller."""
_TYPICAL_CONTEXT = 256
TYPICAL_PROMPT = 128
"""Tokens of the request that `slo_warnings` judges targets by, and of the newcomer that slices must not delay."""


def iteration_capacity_s(
    slo: SloConfig, slack_fraction: float, num_decode: int, correction_s: float = 0.0
) -> float:
    """Latency capacity of one iteration, overhead included; `correction_s` is taken off for those that decode."""
    if num_decode:
        return slack_fraction * slo.tbt_s - correction_s
    return slack_fraction * max(slo.tbt_s, _UNSERVED_SHARE_OF_TTFT * slo.ttft_s)


def ttft_slack_s(view: IterationView, slo: SloConfig, iteration_s: float, num_prefill_tokens: int) -> float | None:
    """Seconds that may be lost before the first request misses its TTFT target; None if no request waits for one.

    This iteration is predicted to last `iteration_s` without fine-tuning and to compute `num_prefill_tokens`; later
    ones are taken as alike. A request that cannot start for want of a seat or of KV blocks waits until a running one
    ends, which nobody can predict and which slices would put off: then the answer is 0.
    """
    num_waiting = view.num_waiting_unseen + sum(not prefill.is_running for prefill in view.prefills)
    if num_waiting > view.free_seats or (num_waiting > 0 and num_prefill_tokens == 0):
        return 0.0
    slack_s = []
    tokens_ahead, target_s = 0, slo.ttft_s - view.now_s
    for prefill in view.prefills:
        tokens_ahead += prefill.num_tokens
        slack_s.append(prefill.arrived_s + target_s - _finish_s(tokens_ahead, num_prefill_tokens, iteration_s))
    if view.num_waiting_unseen and view.oldest_unseen_s is not None:
        # The last of the unseen has the most work ahead, the oldest the nearest deadline: together a lower bound.
        tokens_ahead += view.unseen_tokens
        finish_s = _finish_s(tokens_ahead, num_prefill_tokens, iteration_s)
        slack_s.append(view.oldest_unseen_s + target_s - finish_s)
    return min(slack_s, default=None)


def _finish_s(tokens_ahead: int, tokens_per_iteration: int, iteration_s: float) -> float:
    """Time until the last of `tokens_ahead` prompt tokens is computed."""
    if tokens_per_iteration <= 0:  # prompts in progress that got nothing: no KV blocks
        return iteration_s
    return iteration_s * max(1.0, tokens_ahead / tokens_per_iteration)


def slo_warnings(slo: SloConfig, config: SchedulerConfig, predictor: LatencyPredictor) -> list[str]:
    """Sentences about targets that the device cannot meet, or that leave no time to train, with those that would.

    Asked of the profile; empty if all is well or nothing is known.
    """
    decode_s = predictor.forward_upper_s(ForwardShape(num_decode=1, decode_context=_TYPICAL_CONTEXT))
    prompt_s = predictor.forward_s(ForwardShape().with_chunk(TYPICAL_PROMPT, 0))
    if decode_s is None or prompt_s is None:
        return []
    token_s = decode_s + predictor.overhead_s
    first_s = prompt_s + predictor.overhead_s
    slice_s = predictor.slice_upper_s(SliceKind.BACKWARD_LAYER, SMALLEST_SLICE_TOKENS) or 0.0
    warnings = []
    if config.slack_fraction * slo.tbt_s - token_s < slice_s:
        enough_s = max(ROOM * token_s, (token_s + slice_s) / config.slack_fraction)
        what = "the target cannot be met, and nothing" if token_s > slo.tbt_s else "nothing"
        warnings.append(
            f"slo.tbt_s is {slo.tbt_s:g} s, and a token of a single request takes up to {token_s:.3g} s on this "
            f"device: {what} is left for training while somebody is served; {enough_s:.2g} s would leave room"
        )
    if first_s > slo.ttft_s:
        warnings.append(
            f"slo.ttft_s is {slo.ttft_s:g} s, but a prompt of {TYPICAL_PROMPT} tokens takes {first_s:.3g} s on this "
            f"device: the target cannot be met; {ROOM * first_s:.2g} s would leave room"
        )
    return warnings
