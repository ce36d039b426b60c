"""The numbers of the demo: what each policy reached, when, for how many steps, and how that compares.

A target is 95 % of what `continuous` has at the end of the same phase, mean over seeds. A policy has recovered at the
first look after the change at which its live version is that good. Phase 0 is learning from nothing; the changes
are the phases after it. All intervals are 95 % bootstrap percentiles.

A comparison's unit is one change in one run; the policies are paired by seed and phase, since they met the same pairs.
A policy that did not recover within a phase is counted with the phase's whole length, and the row says so: the true
ratio is then beyond the one given. A seed that only one of two policies was run with does not count for them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.harness.statistics import crossed_interval, mean, percentile, ratio_interval
from benchmarks.studies.drift.plan import Policy
from benchmarks.studies.drift.record import Run, mean_accuracy

TARGET_SHARE = 0.95

Row = dict[str, Any]

_RELATIONS: tuple[tuple[str, str, Policy, Policy, dict[str, float]], ...] = (
    ("final accuracy: mace / continuous", "final_by_seed", Policy.MACE, Policy.CONTINUOUS, {"at_least": 0.95}),
    (
        "steps of mace until the target / all steps of continuous in that phase",
        "recovery_steps",
        Policy.MACE,
        Policy.CONTINUOUS,
        {"at_most": 0.5},
    ),
    ("all optimizer steps: mace / continuous", "all_steps", Policy.MACE, Policy.CONTINUOUS, {"at_most": 0.5}),
    ("time to recover: periodic / mace", "recovery_s", Policy.PERIODIC, Policy.MACE, {"at_least": 3.0}),
    ("time to recover: periodic with all slots / mace", "recovery_s", Policy.PERIODIC_FULL, Policy.MACE, {}),
    ("time to recover: continuous / mace", "recovery_s", Policy.CONTINUOUS, Policy.MACE, {}),
    ("all optimizer steps: without γ·L_DPO / mace", "all_steps", Policy.NO_REWARD, Policy.MACE, {}),
    ("time to recover: without γ·L_DPO / mace", "recovery_s", Policy.NO_REWARD, Policy.MACE, {}),
)
"""Name, quantity, the policies above and below the line, and the bound that is expected of the ratio."""


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything in built-in types, as `summary.json` holds it."""
    by_policy: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_policy.setdefault(run.policy, []).append(run)
    plan = runs[0].plan
    targets = _targets(by_policy.get(Policy.CONTINUOUS, []), len(plan.styles))
    policies = {name: _policy_row(some, targets) for name, some in by_policy.items()}
    return {
        "plan": plan.model_dump(mode="json"),
        "seeds": sorted({run.seed for run in runs}),
        "versions": runs[0].versions,
        "targets": targets,
        "policies": policies,
        "comparisons": compare(policies, plan.phase_s),
    }


def recovery(run: Run, phase: int, target: float) -> dict[str, Any]:
    """When a run reached a target in a phase, and with how many steps of that phase. None: not within it."""
    began_s = phase * run.plan.phase_s
    for point in run.of_phase(phase):
        if point.accuracy >= target:
            return {"time_s": max(0.0, point.time_s - began_s), "steps": point.steps - run.steps_before(phase)}
    return {"time_s": None, "steps": None}


def _targets(continuous: list[Run], num_phases: int) -> list[float | None]:
    if not continuous:
        return [None] * num_phases
    finals = [[run.of_phase(phase)[-1].accuracy for run in continuous] for phase in range(num_phases)]
    return [TARGET_SHARE * float(np.mean(final)) for final in finals]


def _policy_row(runs: list[Run], targets: list[float | None]) -> dict[str, Any]:
    return {
        "runs": len(runs),
        "seeds": [run.seed for run in runs],
        "mean_accuracy": _over_seeds(runs, lambda run: mean_accuracy(run.points)),
        "steps": _over_seeds(runs, lambda run: run.points[-1].steps),
        "pairs_trained": _over_seeds(runs, lambda run: run.points[-1].pairs),
        "pairs_posted": _over_seeds(runs, lambda run: run.posts.accepted),
        "versions": _over_seeds(runs, lambda run: len({point.version for point in run.points}) - 1),
        "rejected": _over_seeds(runs, lambda run: sum(one.get("status") == "rejected" for one in run.adapters)),
        "phases": [_phase_row(runs, phase, target) for phase, target in enumerate(targets)],
        "stream": _stream_row(runs),
        "max_served_gap": max(run.served_gap for run in runs),
    }


def _phase_row(runs: list[Run], phase: int, target: float | None) -> dict[str, Any]:
    style = runs[0].plan.styles[phase].value
    finals = [run.of_phase(phase)[-1] for run in runs]
    hits = np.stack([run.hits(point.version, style) for run, point in zip(runs, finals, strict=True)])
    found = [] if target is None else [recovery(run, phase, target) for run in runs]
    return {
        "style": style,
        "final_accuracy": float(hits.mean()),
        "final_accuracy_interval": crossed_interval(hits, runs[0].facts[style]),
        "final_by_seed": hits.mean(axis=1).tolist(),
        "final_margin": mean(point.margin for point in finals),
        "final_clpd": mean(point.clpd for point in finals),
        "start_accuracy": mean(run.of_phase(phase)[0].accuracy for run in runs),
        "mean_accuracy": mean(mean_accuracy(run.of_phase(phase)) for run in runs),
        "steps": [run.steps_in(phase) for run in runs],
        "recovery_s": [one["time_s"] for one in found],
        "recovery_steps": [one["steps"] for one in found],
        "style_share": _style_share(runs, phase),
    }


def _style_share(runs: list[Run], phase: int) -> float | None:
    """Share of the answers that users got in the second half of the phase that were in the style they like."""
    plan = runs[0].plan
    replies = [
        reply
        for run in runs
        for reply in run.stream.replies
        if (phase + 0.5) * plan.phase_s <= reply.sent_s < (phase + 1) * plan.phase_s
    ]
    return mean(reply.style == plan.styles[phase].value for reply in replies)


def _stream_row(runs: list[Run]) -> dict[str, Any]:
    streams = [run.stream for run in runs]
    ttft = [value for stream in streams for value in stream.ttft_s]
    tbt = [value for stream in streams for value in stream.tbt_s]
    rights = [reply.is_right for stream in streams for reply in stream.replies]
    return {
        "requests": sum(stream.num_requests for stream in streams),
        "failed": sum(len(stream.errors) for stream in streams),
        "failed_posts": sum(len(run.posts.errors) for run in runs),
        "right": mean(rights),
        **{f"ttft_p{q}_s": percentile(ttft, q) for q in (50, 99)},
        **{f"tbt_p{q}_s": percentile(tbt, q) for q in (50, 99)},
    }


def compare(policies: dict[str, Row], phase_s: float) -> list[Row]:
    """The expected relations between the policies, measured over the changes (every phase but the first).

    One row for each relation whose policies were run with a seed in common; those of recovery need `continuous`, which
    sets the target.
    """
    mace = policies.get(Policy.MACE)
    there = {name for name, row in policies.items() if mace and set(row["seeds"]) & set(mace["seeds"])}
    rows = []
    for name, quantity, over, under, bound in _RELATIONS:
        if {over, under} <= there and ("recovery" not in quantity or Policy.CONTINUOUS in there):
            one, other = policies[over], policies[under]
            seeds = [seed for seed in one["seeds"] if seed in other["seeds"]]
            below = "steps" if quantity == "recovery_steps" else quantity
            units = _units(one, quantity, seeds, phase_s), _units(other, below, seeds, phase_s)
            rows.append({"what": name, **_ratio(*units, bound, both_may_miss=quantity == "recovery_s")})
    return rows


def _units(row: Row, quantity: str, seeds: list[int], phase_s: float) -> tuple[list[float], int]:
    """A quantity for each seed, or for each change and seed, and how many of these never recovered."""
    places = [row["seeds"].index(seed) for seed in seeds]
    if quantity == "all_steps":
        return [row["steps"]["by_seed"][place] for place in places], 0
    units = [(phase, place) for phase in row["phases"][1:] for place in places]
    values = [phase[quantity][place] for phase, place in units]
    whole = [phase_s if quantity == "recovery_s" else phase["steps"][place] for phase, place in units]
    known = [limit if value is None else value for value, limit in zip(values, whole, strict=True)]
    return known, values.count(None)


def _ratio(
    over: tuple[list[float], int], under: tuple[list[float], int], bound: dict[str, float], *, both_may_miss: bool
) -> Row:
    (above, missed_above), (below, missed_below) = over, under
    value = sum(above) / sum(below) if sum(below) else None
    passed = None
    if bound and value is not None:
        within = bound.get("at_least", -np.inf) <= value <= bound.get("at_most", np.inf)
        passed = within and not (missed_below if "at_least" in bound else missed_above)
    interval = [limit if np.isfinite(limit) else None for limit in ratio_interval(above, below)]
    missed = {"above": missed_above, "below": missed_below} if both_may_miss else missed_above
    return {"value": value, "interval": interval, "not_recovered": missed, **bound, "passed": passed}


def _over_seeds(runs: list[Run], value: Callable[[Run], float]) -> dict[str, Any]:
    values = [float(value(run)) for run in runs]
    return {"mean": float(np.mean(values)), "by_seed": values}
