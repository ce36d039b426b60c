"""Priorities of the three kinds of work, PREFILL, DECODE and FINETUNE. Higher runs first.

Paper: `P(t) = base[type] + rate[type]·wait`, and `P_ft(t) + γ·L_DPO` for fine-tuning.
"""

import math

from core.config import SchedulerConfig

MAX_USER_PRIORITY = 10
"""A request's `priority` field counts within ±10: beyond, one client could push all others back for ever."""


def clamp_user_priority(value: int) -> int:
    """The `priority` field of a request (lower is sooner), within bounds."""
    return max(-MAX_USER_PRIORITY, min(MAX_USER_PRIORITY, value))


def is_batch(user_priority: int) -> bool:
    """Whether a request is of class `batch`; otherwise it is `interactive`."""
    return user_priority > 0


def prefill_base(user_priority: int, config: SchedulerConfig) -> float:
    """Priority of a prefill that has just arrived."""
    base = config.base_priority_batch if is_batch(user_priority) else config.base_priority_prefill
    return base - config.priority_step * clamp_user_priority(user_priority)


def prefill_rate(user_priority: int, config: SchedulerConfig) -> float:
    """Priority that a prefill gains with each second of waiting; 0 with ageing switched off."""
    if not config.ageing:
        return 0.0
    return config.rate_batch if is_batch(user_priority) else config.rate_prefill


def prefill_priority(wait_s: float, user_priority: int, config: SchedulerConfig) -> float:
    """`P(t) = base[class] + rate[class] * wait_s` of a request that has no first token yet."""
    return prefill_base(user_priority, config) + prefill_rate(user_priority, config) * max(0.0, wait_s)


def decode_priority(wait_s: float, config: SchedulerConfig) -> float:
    """`P(t)` of the running requests' next tokens; `wait_s` since the last one."""
    return config.base_priority_decode + (config.rate_decode * max(0.0, wait_s) if config.ageing else 0.0)


def finetune_rate(config: SchedulerConfig) -> float:
    """Priority that fine-tune work gains with each second of waiting; 0 with ageing switched off."""
    return config.rate_finetune if config.ageing else 0.0


def finetune_priority(
    wait_s: float, dpo_loss: float | None, attempts: int, config: SchedulerConfig, gamma: float | None = None
) -> float:
    """`P_ft(t) + γ·L_DPO`; the loss is clipped and decays with each retry.

    A loss of None (not scored yet) counts as ln 2, the DPO loss of an adapter that changes nothing. A gamma of None is
    the configured one; a drift monitor raises it while preferences change.
    """
    aged = config.base_priority_finetune + finetune_rate(config) * max(0.0, wait_s)
    if not config.reward_term:
        return aged
    loss = math.log(2) if dpo_loss is None else min(max(dpo_loss, 0.0), config.max_loss_term)
    return aged + (config.gamma if gamma is None else gamma) * loss * config.retry_decay**attempts


def starvation_bound_s(config: SchedulerConfig) -> float:
    """Longest time that fine-tune work in an engine goes without a slice while inference is saturated.

    After it the work's priority is above that of decoding, and one slice runs whatever the slack. Infinite with
    ageing switched off.
    """
    rate = finetune_rate(config)
    gap = decode_priority(0.0, config) - finetune_priority(0.0, 0.0, 0, config)
    if gap <= 0:
        return 0.0
    return gap / rate if rate > 0 else math.inf
