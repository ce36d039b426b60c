"""Seconds that an iteration may last, and seconds of it that may go to fine-tuning, from the SLO targets.

TBT: every running request waits for the whole iteration, so an iteration of predicted latency above the target
is a miss for all of them. TTFT: a request without its first token waits for this iteration and for those that its
prompt, and the prompts ahead of it, still need; what is left until its target may be spent on fine-tuning.
"""

from core.config import SloConfig
from scheduler.plan import IterationView

_UNSERVED_SHARE_OF_TTFT = 0.5
"""With nobody decoding, an iteration may last this share of the TTFT target: a request that arrives just after its
start still has the other half for its own prompt."""


def iteration_capacity_s(slo: SloConfig, slack_fraction: float, num_decode: int) -> float:
    """Latency capacity of one iteration, overhead included."""
    if num_decode:
        return slack_fraction * slo.tbt_s
    return slack_fraction * max(slo.tbt_s, _UNSERVED_SHARE_OF_TTFT * slo.ttft_s)


def ttft_slack_s(view: IterationView, slo: SloConfig, iteration_s: float, num_prefill_tokens: int) -> float | None:
    """Seconds that may be lost before the first request misses its TTFT target; None if no request waits for one.

    Args:
        view: the state that was planned for.
        slo: targets.
        iteration_s: predicted duration of this iteration without fine-tuning; later ones are taken as alike.
        num_prefill_tokens: prompt tokens that such an iteration computes.

    A request that cannot start for want of a seat or of KV blocks waits until a running one ends, which nobody can
    predict and which slices would put off: then the answer is 0.
    """
    if _is_anyone_shut_out(view, num_prefill_tokens):
        return 0.0
    slack_s: float | None = None
    tokens_ahead = 0
    for prefill in view.prefills:
        tokens_ahead += prefill.num_tokens
        left_s = (
            prefill.arrived_s + slo.ttft_s - view.now_s - _finish_s(tokens_ahead, num_prefill_tokens, iteration_s)
        )
        slack_s = left_s if slack_s is None else min(slack_s, left_s)
    if view.num_waiting_unseen and view.oldest_unseen_s is not None:
        # The last of the unseen has the most work ahead, the oldest the nearest deadline: together a lower bound.
        tokens_ahead += view.unseen_tokens
        finish_s = _finish_s(tokens_ahead, num_prefill_tokens, iteration_s)
        left_s = view.oldest_unseen_s + slo.ttft_s - view.now_s - finish_s
        slack_s = left_s if slack_s is None else min(slack_s, left_s)
    return slack_s


def _is_anyone_shut_out(view: IterationView, num_prefill_tokens: int) -> bool:
    num_waiting = view.num_waiting_unseen + sum(not prefill.is_running for prefill in view.prefills)
    return num_waiting > view.free_seats or (num_waiting > 0 and num_prefill_tokens == 0)


def _finish_s(tokens_ahead: int, tokens_per_iteration: int, iteration_s: float) -> float:
    """Time until the last of `tokens_ahead` prompt tokens is computed."""
    if tokens_per_iteration <= 0:  # prompts in progress that got nothing: no KV blocks
        return iteration_s
    return iteration_s * max(1.0, tokens_ahead / tokens_per_iteration)
