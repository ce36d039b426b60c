"""The numbers of the demo: what each policy reached, when, for how many steps, and how that compares.

A target is 95 % of what `continuous` has at the end of the same phase, mean over seeds. A policy has recovered at the
first look after the change at which its live version is that good. Phase 0 is learning from nothing; the changes
are the phases after it. All intervals are 95 % bootstrap percentiles.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.studies.drift.comparisons import compare
from benchmarks.studies.drift.curves import Point, Run, mean_accuracy
from benchmarks.studies.drift.policies import Policy
from benchmarks.studies.drift.statistics import crossed_interval

TARGET_SHARE = 0.95


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
        "versions": runs[0].record.versions,
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
        "pairs_posted": _over_seeds(runs, lambda run: run.record.posts.accepted),
        "versions": _over_seeds(runs, lambda run: len({point.version for point in run.points}) - 1),
        "rejected": _over_seeds(
            runs, lambda run: sum(one.get("status") == "rejected" for one in run.record.adapters)
        ),
        "phases": [_phase_row(runs, phase, target) for phase, target in enumerate(targets)],
        "stream": _stream_row(runs),
        "max_served_gap": max(run.record.served_gap for run in runs),
    }


def _phase_row(runs: list[Run], phase: int, target: float | None) -> dict[str, Any]:
    style = runs[0].plan.styles[phase].value
    finals = [run.of_phase(phase)[-1] for run in runs]
    hits = np.stack([run.hits(point.version, style) for run, point in zip(runs, finals, strict=True)])
    found = [] if target is None else [recovery(run, phase, target) for run in runs]
    return {
        "style": style,
        "final_accuracy": float(hits.mean()),
        "final_accuracy_interval": crossed_interval(hits, runs[0].record.facts[style]),
        "final_by_seed": hits.mean(axis=1).tolist(),
        "final_margin": _mean(finals, lambda point: point.margin),
        "final_clpd": _mean(finals, lambda point: point.clpd),
        "start_accuracy": _mean([run.of_phase(phase)[0] for run in runs], lambda point: point.accuracy),
        "mean_accuracy": float(np.mean([mean_accuracy(run.of_phase(phase)) for run in runs])),
        "steps": [run.steps_in(phase) for run in runs],
        "recovery_s": [one["time_s"] for one in found],
        "recovery_steps": [one["steps"] for one in found],
        "style_share": _style_share(runs, phase),
    }


def _style_share(runs: list[Run], phase: int) -> float | None:
    """Of the answers that users got in the second half of the phase: how many were in the style they like."""
    plan = runs[0].plan
    replies = [
        reply
        for run in runs
        for reply in run.record.stream.replies
        if (phase + 0.5) * plan.phase_s <= reply.sent_s < (phase + 1) * plan.phase_s
    ]
    return float(np.mean([reply.style == plan.styles[phase].value for reply in replies])) if replies else None


def _stream_row(runs: list[Run]) -> dict[str, Any]:
    streams = [run.record.stream for run in runs]
    ttft = [value for stream in streams for value in stream.ttft_s]
    tbt = [value for stream in streams for value in stream.tbt_s]
    rights = [reply.is_right for stream in streams for reply in stream.replies]
    return {
        "requests": sum(stream.num_requests for stream in streams),
        "failed": sum(len(stream.errors) for stream in streams),
        "failed_posts": sum(len(run.record.posts.errors) for run in runs),
        "right": float(np.mean(rights)) if rights else None,
        **{f"ttft_p{q}_s": float(np.percentile(ttft, q)) if ttft else None for q in (50, 99)},
        **{f"tbt_p{q}_s": float(np.percentile(tbt, q)) if tbt else None for q in (50, 99)},
    }


def _over_seeds(runs: list[Run], value: Callable[[Run], float]) -> dict[str, Any]:
    values = [float(value(run)) for run in runs]
    return {"mean": float(np.mean(values)), "by_seed": values}


def _mean(points: list[Point], value: Callable[[Point], float]) -> float:
    return float(np.mean([value(point) for point in points]))
