"""Priorities (paper: P(t) with waiting time, and P_ft(t) + γ·L_DPO for fine-tuning). Higher runs first."""

import math
from enum import StrEnum

from core.config import SchedulerConfig


class TaskType(StrEnum):
    """The three kinds of work that share the device."""

    PREFILL = "prefill"
    DECODE = "decode"
    FINETUNE = "finetune"


def priority(task_type: TaskType, wait_s: float, config: SchedulerConfig) -> float:
    """`P(t) = base[type] + rate[type] * wait_s`: ageing, so that no type starves."""
    base = {
        TaskType.PREFILL: config.base_priority_prefill,
        TaskType.DECODE: config.base_priority_decode,
        TaskType.FINETUNE: config.base_priority_finetune,
    }[task_type]
    rate = {
        TaskType.PREFILL: config.rate_prefill,
        TaskType.DECODE: config.rate_decode,
        TaskType.FINETUNE: config.rate_finetune,
    }[task_type]
    return base + rate * max(0.0, wait_s)


def finetune_priority(wait_s: float, dpo_loss: float | None, attempts: int, config: SchedulerConfig) -> float:
    """`P_ft(t) + γ·L_DPO`; the loss is clipped and decays with each retry.

    A loss of None (not scored yet) counts as ln 2, the DPO loss of an adapter that changes nothing.
    """
    loss = math.log(2) if dpo_loss is None else min(max(dpo_loss, 0.0), config.max_loss_term)
    reward = config.gamma * loss * config.retry_decay**attempts
    return priority(TaskType.FINETUNE, wait_s, config) + reward
