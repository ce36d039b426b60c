"""What a chaos run found: numbers by kind of kill, and whether anything was lost."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.studies.chaos.ledger import Audit, Ledger, audit_to_wire
from benchmarks.studies.chaos.load import STALL_S, ChatRequest
from benchmarks.studies.chaos.strike import Kill
from benchmarks.studies.chaos.watch import VersionWatch

MAX_STEPS_LOST = 1


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that a run collected."""

    seed: int
    duration_s: float
    planned: int
    stopped: str | None
    """Why the plan was not carried out to its end, if something went wrong."""
    kills: Sequence[Kill]
    requests: Sequence[ChatRequest]
    ledger: Ledger
    audit: Audit
    versions: VersionWatch
    restarts: int
    left_behind: int
    """Processes that a polite end of the server left, and that had to be killed."""


def make_report(findings: Findings) -> dict[str, Any]:
    """The document that `--json` prints. `passed` is False if anything in `problems`."""
    kills, failed = findings.kills, failures_by_kill(findings.kills, findings.requests)
    steps_lost = [kill.steps_lost for kill in kills if kill.steps_lost is not None]
    report: dict[str, Any] = {
        "passed": True,
        "problems": [],
        "seed": findings.seed,
        "duration_s": round(findings.duration_s, 1),
        "planned_kills": findings.planned,
        "kills": len(kills),
        "kills_by_kind": dict(Counter(kill.kind for kill in kills)),
        "feedback": {
            **audit_to_wire(findings.audit),
            "repeated_posts": findings.ledger.repeats,
            "answers": dict(findings.ledger.answers),
        },
        "requests": _requests(findings.requests, failed),
        "steps_lost_max": max(steps_lost, default=None),
        "steps_lost_known_for": len(steps_lost),
        "recovery_s": _by_kind(kills, lambda kill: kill.recovery_s),
        "downtime_s": _by_kind(kills, lambda kill: downtime_s(kill, findings.requests)),
        "training_again_s": _by_kind(kills, lambda kill: kill.training_s),
        "versions": {
            "seen": len(findings.versions.seen),
            "half_written": findings.versions.half_written,
            "looks": findings.versions.looks,
        },
        "restarts": findings.restarts,
        "left_behind": findings.left_behind,
        "each": [
            _kill_to_wire(kill)
            | {
                "downtime_s": _rounded(downtime_s(kill, findings.requests)),
                "failed_requests": failed[kill.number],
            }
            for kill in kills
        ],
    }
    report["problems"] = _problems(findings, report["steps_lost_max"])
    report["passed"] = not report["problems"]
    return report


def failures_by_kill(kills: Sequence[Kill], requests: Sequence[ChatRequest]) -> Counter[int]:
    """Failed requests by number of the last kill before their end; 0 counts those before the first."""
    failed: Counter[int] = Counter()
    for request in requests:
        if not request.succeeded:
            ended_s = float("inf") if request.ended_s is None else request.ended_s
            failed[max((kill.number for kill in kills if kill.struck_s <= ended_s), default=0)] += 1
    return failed


def downtime_s(kill: Kill, requests: Sequence[ChatRequest]) -> float | None:
    """The longest time without a good answer between the kill and recovery; None if that did not come.

    Not until the first answer: what dies slowly (an engine without its Ray) may answer once more.
    """
    if kill.recovery_s is None:
        return None
    end_s = kill.struck_s + kill.recovery_s
    good = (request.ended_s for request in requests if request.succeeded and request.ended_s is not None)
    moments = [kill.struck_s, *sorted(moment for moment in good if kill.struck_s < moment < end_s), end_s]
    return max(later - earlier for earlier, later in itertools.pairwise(moments))


def show_report(report: dict[str, Any], console: Console) -> None:
    """The same for people."""
    failed: Counter[str] = Counter()
    for one in report["each"]:
        failed[one["kind"]] += one["failed_requests"]
    table = Table(
        "killed", "times", "recovery p50", "p90", "max, s", "downtime p50", "max, s", "failed", "steps lost"
    )
    for kind, count in [*report["kills_by_kind"].items(), ("all", report["kills"])]:
        recovery, downtime = report["recovery_s"][kind], report["downtime_s"][kind]
        lost = [one["steps_lost"] for one in report["each"] if kind in (one["kind"], "all")]
        known = [value for value in lost if value is not None]
        table.add_row(
            kind,
            str(count),
            *(_text(recovery[key]) for key in ("p50", "p90", "max")),
            *(_text(downtime[key]) for key in ("p50", "max")),
            str(failed[kind] if kind != "all" else report["requests"]["failed"]),
            str(max(known)) if known else "-",
        )
    console.print(table)
    feedback, requests, versions = report["feedback"], report["requests"], report["versions"]
    console.print(
        f"feedback: {feedback['acknowledged']} acknowledged, {feedback['lost']} lost, "
        f"{feedback['duplicated']} duplicated, {feedback['in_doubt']} never acknowledged"
    )
    console.print(
        f"requests: {requests['sent']} sent, {requests['failed']} failed ({requests['failed_share']:.1%}), "
        f"{requests['stalled']} took more than {STALL_S:g} s"
    )
    console.print(
        f"versions: {versions['seen']} seen in {versions['looks']} looks, {len(versions['half_written'])} half-written"
    )
    console.print(f"seed {report['seed']}, {report['duration_s']:.0f} s, {report['restarts']} restarts")
    for problem in report["problems"]:
        console.print(problem, style="red", markup=False)
    console.print(
        "nothing was lost" if report["passed"] else "FAILED", style="green" if report["passed"] else "red"
    )


def _problems(findings: Findings, steps_lost: int | None) -> list[str]:
    audit, kills, refused = findings.audit, findings.kills, findings.ledger.refused
    stuck = [kill.number for kill in kills if kill.recovery_s is None]
    idle = [kill.number for kill in kills if kill.training_s is None]
    named = {
        f"{len(audit.lost)} acknowledged records are lost": bool(audit.lost),
        f"{len(audit.duplicated)} records are there twice": bool(audit.duplicated),
        f"{audit.unknown} records that nobody sent": audit.unknown > 0,
        f"{len(refused)} records were refused, the first: {next(iter(refused.items()), None)}": bool(refused),
        f"versions that were not whole: {findings.versions.half_written}": bool(findings.versions.half_written),
        f"{steps_lost} optimizer steps were lost by one kill": (steps_lost or 0) > MAX_STEPS_LOST,
        f"no recovery in time after kills {stuck}": bool(stuck),
        f"no training in time after kills {idle}": bool(idle),
        f"{findings.left_behind} processes outlived the server": findings.left_behind > 0,
        f"the run was stopped: {findings.stopped}": findings.stopped is not None,
        "no kill was carried out": not kills,
    }
    return [text for text, is_so in named.items() if is_so]


def _requests(requests: Sequence[ChatRequest], failed: Counter[int]) -> dict[str, Any]:
    took_s = [request.ended_s - request.sent_s for request in requests if request.succeeded and request.ended_s]
    errors = Counter(request.error.partition(":")[0] for request in requests if request.error)
    return {
        "sent": len(requests),
        "failed": failed.total(),
        "failed_share": round(failed.total() / max(1, len(requests)), 4),
        "failed_before_the_first_kill": failed[0],
        "errors": dict(errors),
        "stalled": sum(value > STALL_S for value in took_s),
        "latency_s": _quantiles(took_s),
    }


def _by_kind(kills: Sequence[Kill], value_of: Callable[[Kill], float | None]) -> dict[str, Any]:
    kinds = dict.fromkeys(kill.kind for kill in kills)
    return {"all": _quantiles([value_of(kill) for kill in kills])} | {
        kind: _quantiles([value_of(kill) for kill in kills if kill.kind == kind]) for kind in kinds
    }


def _quantiles(values: Sequence[float | None]) -> dict[str, Any]:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return {"count": 0, "p50": None, "p90": None, "max": None}
    p50, p90 = np.percentile(known, [50, 90])
    return {"count": len(known), "p50": round(p50, 2), "p90": round(p90, 2), "max": round(max(known), 2)}


def _kill_to_wire(kill: Kill) -> dict[str, Any]:
    wire = {key: _rounded(value) if isinstance(value, float) else value for key, value in asdict(kill).items()}
    wire.pop("struck_s")
    return wire


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
