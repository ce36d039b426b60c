"""Priorities of the three kinds of work: prefill, decode and fine-tuning. Higher runs first.

The paper's equation, with `wait` in seconds:

    P(t) = base[kind] + rate[kind] * wait                  and, for fine-tuning,  + γ * L_DPO

Requests are of class `interactive`, or of class `background` if their `priority` field is above 0 (`service_tier:
flex` sets it). With `experiments.ageing` off no rate counts; with `experiments.reward_term` off no loss does.

While inference is saturated, fine-tune work without a loss passes decoding after (20 - 1) / 0.2 = 95 s: then one slice
runs whatever the slack.
"""

import math

from core.config import ExperimentsConfig

BASE_DECODE = 20.0
BASE_PREFILL = 10.0
BASE_PREFILL_BACKGROUND = 5.0
BASE_FINETUNE = 1.0
RATE_DECODE = RATE_PREFILL = 1.0
RATE_PREFILL_BACKGROUND = RATE_FINETUNE = 0.2
"""Priority gained with each second of waiting."""
PRIORITY_STEP = 1.0
"""Taken from a request's base for each unit of its `priority` field (lower is sooner)."""
BACKGROUND_PRIORITY = 1
"""The `priority` field of a request that says no more than its class, `background`."""
MAX_USER_PRIORITY = 10
"""A request's `priority` field counts within ±10: beyond, one client could push all others back for ever."""
MAX_LOSS_TERM = 5.0
"""`L_DPO` is clipped here, so that one hostile pair cannot own the device."""
RETRY_DECAY = 0.5
"""Factor of the loss for each failed try of a task."""


def clamp_user_priority(value: int) -> int:
    """The `priority` field of a request (lower is sooner), within bounds."""
    return max(-MAX_USER_PRIORITY, min(MAX_USER_PRIORITY, value))


def prefill_base(user_priority: int) -> float:
    """Priority of a prefill that has just arrived."""
    base = BASE_PREFILL_BACKGROUND if user_priority > 0 else BASE_PREFILL
    return base - PRIORITY_STEP * clamp_user_priority(user_priority)


def prefill_rate(user_priority: int, experiments: ExperimentsConfig) -> float:
    """Priority that a prefill gains with each second of waiting."""
    if not experiments.ageing:
        return 0.0
    return RATE_PREFILL_BACKGROUND if user_priority > 0 else RATE_PREFILL


def prefill_priority(wait_s: float, user_priority: int, experiments: ExperimentsConfig) -> float:
    """`P(t)` of a request that has no first token yet."""
    return prefill_base(user_priority) + prefill_rate(user_priority, experiments) * max(0.0, wait_s)


def decode_priority(wait_s: float, experiments: ExperimentsConfig) -> float:
    """`P(t)` of the running requests' next tokens; `wait_s` since the last one."""
    return BASE_DECODE + (RATE_DECODE * max(0.0, wait_s) if experiments.ageing else 0.0)


def finetune_rate(experiments: ExperimentsConfig) -> float:
    """Priority that fine-tune work gains with each second of waiting."""
    return RATE_FINETUNE if experiments.ageing else 0.0


def finetune_priority(
    wait_s: float, dpo_loss: float | None, attempts: int, gamma: float, experiments: ExperimentsConfig
) -> float:
    """`P(t) + γ·L_DPO`; the loss is clipped and decays with each retry.

    A loss of None (not scored yet) counts as ln 2, the DPO loss of an adapter that changes nothing.
    """
    aged = BASE_FINETUNE + finetune_rate(experiments) * max(0.0, wait_s)
    if not experiments.reward_term:
        return aged
    loss = math.log(2) if dpo_loss is None else min(max(dpo_loss, 0.0), MAX_LOSS_TERM)
    return aged + gamma * loss * RETRY_DECAY**attempts
