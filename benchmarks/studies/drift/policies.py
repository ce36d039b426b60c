"""The policies that are compared, as settings of the server. Nothing else differs between them.

`periodic` is Ekya's scheme on this server: it collects for a window and then stops inference to train on what came. Two
windows a phase are a generous choice: with fewer a phase could end before the first training. `continuous` trains
as soon as there is a batch, stopping inference as well. It may train `HEADROOM` times what comes in: a little more, so
that it is not short of training slots. `periodic` ends a phase with its first candidate: one new model for each window,
and about as many steps as `mace`. `periodic-full` goes on until its slots are used up; then its phases last most of a
window, train what arrives meanwhile, and run into each other: it is `continuous` by another name.
"""

from enum import StrEnum
from typing import Any

from benchmarks.studies.drift.plan import DriftPlan
from core.alignment_config import DriftConfig

WINDOWS_PER_PHASE = 2
HEADROOM = 1.2
FIRST_CANDIDATE_GAP_S = 0.5
"""Longer than it takes to fetch the next batch, shorter than to judge and publish a candidate."""
_KEPT_VERSIONS = 1000
"""All of them: they are scored after the run."""


class Policy(StrEnum):
    """Who decides when to train."""

    MACE = "mace"
    NO_REWARD = "mace-no-reward"
    PERIODIC = "periodic"
    PERIODIC_FULL = "periodic-full"
    CONTINUOUS = "continuous"
    FROZEN = "frozen"


TITLES = {
    Policy.MACE: "mace",
    Policy.NO_REWARD: "mace without γ·L_DPO",
    Policy.PERIODIC: "periodic",
    Policy.PERIODIC_FULL: "periodic, all slots",
    Policy.CONTINUOUS: "continuous",
    Policy.FROZEN: "frozen",
}


def policy_sections(policy: Policy, plan: DriftPlan) -> dict[str, dict[str, Any]]:
    """What makes a policy; the same retrain rate in all of them, `mace` has no use for it."""
    slots_per_s = DriftConfig().alarm_rate * plan.pairs_per_s
    experiments: dict[str, Any] = {
        "retrain_rate": HEADROOM * slots_per_s / plan.requests_per_s,
        "period_requests": max(1, round(plan.requests_per_s * plan.phase_s / WINDOWS_PER_PHASE)),
    }
    name = policy.value
    match policy:
        case Policy.NO_REWARD:
            name, experiments["reward_term"] = "mace", False
        case Policy.PERIODIC:
            experiments["phase_gap_s"] = FIRST_CANDIDATE_GAP_S
        case Policy.PERIODIC_FULL:
            name = "periodic"
        case Policy.FROZEN:
            name = "inference_only"
    return {"scheduler": {"policy": name}, "experiments": experiments}


def sections(policy: Policy, plan: DriftPlan) -> dict[str, dict[str, Any]]:
    """Settings of a run beside those of serve_config.yaml."""
    return {
        **policy_sections(policy, plan),
        "profile": {"measure_at_start": False},
        "versions": {"keep": _KEPT_VERSIONS},
    }
