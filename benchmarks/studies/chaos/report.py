"""Report of a chaos run: numbers by kind of kill, and whether anything was lost."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.harness.client import RequestRecord
from benchmarks.harness.report import Column, digits, table_of
from benchmarks.harness.statistics import percentile
from benchmarks.studies.chaos.load import Audit, Ledger
from benchmarks.studies.chaos.strike import Kill
from benchmarks.studies.chaos.watch import VersionWatch

MAX_STEPS_LOST = 1
STALL_S = 10.0
"""An answer that takes longer came too late for a person, though it came."""

Row = dict[str, Any]

_COLUMNS: tuple[Column, ...] = (
    ("killed", "kind", str),
    ("times", "times", str),
    ("recovery p50", "recovery_p50", digits(1)),
    ("p90", "recovery_p90", digits(1)),
    ("max, s", "recovery_max", digits(1)),
    ("downtime p50", "downtime_p50", digits(1)),
    ("max, s", "downtime_max", digits(1)),
    ("failed", "failed", str),
    ("steps lost", "lost", str),
)


@dataclass(slots=True)
class Findings:
    """Everything that a run collected."""

    seed: int
    planned: int
    stopped: str | None
    """Reason for which the plan was not carried out to its end, if something went wrong."""
    kills: Sequence[Kill]
    requests: Sequence[RequestRecord]
    ledger: Ledger
    audit: Audit
    versions: VersionWatch
    restarts: int
    left_behind: int = 0
    """Processes that a polite end of the server left, and that had to be killed."""
    duration_s: float = 0.0


def make_report(findings: Findings) -> dict[str, Any]:
    """The document that `--json` prints. `passed` is False if anything in `problems`."""
    kills, requests, versions = findings.kills, findings.requests, findings.versions
    failed, audit = failures_by_kill(kills, requests), asdict(findings.audit)
    rows: list[Row] = [
        asdict(kill) | {"downtime_s": downtime_s(kill, requests), "failed_requests": failed[kill.number]}
        for kill in kills
    ]
    steps_lost = _known(rows, "steps_lost")
    problems = _problems(findings, max(steps_lost, default=0))
    return {
        "passed": not problems,
        "problems": problems,
        "seed": findings.seed,
        "duration_s": round(findings.duration_s, 1),
        "planned_kills": findings.planned,
        "kills": len(kills),
        "kills_by_kind": dict(Counter(kill.kind for kill in kills)),
        "feedback": {
            **audit,
            **{name: len(audit[name]) for name in ("lost", "duplicated")},
            **{f"{name}_ids": audit[name][:20] for name in ("lost", "duplicated")},
            "repeated_posts": findings.ledger.repeats,
            "answers": dict(findings.ledger.answers),
        },
        "requests": _requests(requests, failed),
        "steps_lost_max": max(steps_lost, default=None),
        "steps_lost_known_for": len(steps_lost),
        "recovery_s": _by_kind(rows, "recovery_s"),
        "downtime_s": _by_kind(rows, "downtime_s"),
        "training_again_s": _by_kind(rows, "training_s"),
        "versions": {
            "seen": len(versions.seen),
            "half_written": versions.half_written,
            "looks": versions.looks,
        },
        "restarts": findings.restarts,
        "left_behind": findings.left_behind,
        "each": [{name: _rounded(value) for name, value in row.items() if name != "struck_s"} for row in rows],
    }


def failures_by_kill(kills: Sequence[Kill], requests: Sequence[RequestRecord]) -> Counter[int]:
    """Failed requests by number of the last kill before their end; 0 counts those before the first."""
    failed: Counter[int] = Counter()
    for request in requests:
        if not request.succeeded:
            ended_s = float("inf") if request.ended_s is None else request.ended_s
            failed[max((kill.number for kill in kills if kill.struck_s <= ended_s), default=0)] += 1
    return failed


def downtime_s(kill: Kill, requests: Sequence[RequestRecord]) -> float | None:
    """The longest time without a good answer between the kill and recovery; None if that did not come.

    Not until the first answer: what dies slowly (an engine without its Ray) may answer once more.
    """
    if kill.recovery_s is None:
        return None
    end_s = kill.struck_s + kill.recovery_s
    good = (request.ended_s for request in requests if request.succeeded and request.ended_s is not None)
    moments = [kill.struck_s, *sorted(moment for moment in good if kill.struck_s < moment < end_s), end_s]
    return max(later - earlier for earlier, later in itertools.pairwise(moments))


def tables(report: dict[str, Any]) -> Iterator[Table | str]:
    """Make a table and a few lines of the report."""
    feedback, requests, versions = report["feedback"], report["requests"], report["versions"]
    rows = []
    for kind, count in [*report["kills_by_kind"].items(), ("all", report["kills"])]:
        each = [one for one in report["each"] if kind in (one["kind"], "all")]
        failed = requests["failed"] if kind == "all" else sum(one["failed_requests"] for one in each)
        lost = max(_known(each, "steps_lost"), default=None)
        times_s = {
            f"{name}_{key}": value
            for name in ("recovery", "downtime")
            for key, value in report[f"{name}_s"][kind].items()
        }
        rows.append({"kind": kind, "times": count, **times_s, "failed": failed, "lost": lost})
    yield table_of(None, rows, _COLUMNS)
    yield (
        f"feedback: {feedback['acknowledged']} acknowledged, {feedback['lost']} lost, "
        f"{feedback['duplicated']} duplicated, {feedback['in_doubt']} never acknowledged\n"
        f"requests: {requests['sent']} sent, {requests['failed']} failed ({requests['failed_share']:.1%}), "
        f"{requests['stalled']} took more than {STALL_S:g} s\n"
        f"versions: {versions['seen']} seen in {versions['looks']} looks, "
        f"{len(versions['half_written'])} half-written\n"
        f"seed {report['seed']}, {report['duration_s']:.0f} s, {report['restarts']} restarts"
    )
    yield from (f"[red]{escape(problem)}[/red]" for problem in report["problems"])
    yield "[green]nothing was lost[/green]" if report["passed"] else "[red]FAILED[/red]"


def _problems(findings: Findings, steps_lost: int) -> list[str]:
    audit, kills, refused = findings.audit, findings.kills, findings.ledger.refused
    stuck = [kill.number for kill in kills if kill.recovery_s is None]
    idle = [kill.number for kill in kills if kill.training_s is None]
    named = {
        f"{len(audit.lost)} acknowledged records are lost": bool(audit.lost),
        f"{len(audit.duplicated)} records are there twice": bool(audit.duplicated),
        f"{audit.unknown} records that nobody sent": audit.unknown > 0,
        f"{len(refused)} records were refused, the first: {next(iter(refused.items()), None)}": bool(refused),
        f"versions that were not whole: {findings.versions.half_written}": bool(findings.versions.half_written),
        f"{steps_lost} optimizer steps were lost by one kill": steps_lost > MAX_STEPS_LOST,
        f"no recovery in time after kills {stuck}": bool(stuck),
        f"no training in time after kills {idle}": bool(idle),
        f"{findings.left_behind} processes outlived the server": findings.left_behind > 0,
        f"the run was stopped: {findings.stopped}": findings.stopped is not None,
        "no kill was carried out": not kills,
    }
    return [text for text, is_so in named.items() if is_so]


def _requests(requests: Sequence[RequestRecord], failed: Counter[int]) -> dict[str, Any]:
    took_s = [
        one.ended_s - one.sent_s
        for one in requests
        if one.succeeded and one.ended_s is not None and one.sent_s is not None
    ]
    return {
        "sent": len(requests),
        "failed": failed.total(),
        "failed_share": round(failed.total() / max(1, len(requests)), 4),
        "failed_before_the_first_kill": failed[0],
        "errors": dict(Counter(one.error.partition(":")[0] for one in requests if one.error)),
        "stalled": sum(value > STALL_S for value in took_s),
        "latency_s": _quantiles(took_s),
    }


def _by_kind(rows: Sequence[Row], name: str) -> dict[str, Any]:
    kinds = dict.fromkeys(row["kind"] for row in rows)
    by_kind = {kind: _known([row for row in rows if row["kind"] == kind], name) for kind in kinds}
    return {kind: _quantiles(values) for kind, values in {"all": _known(rows, name), **by_kind}.items()}


def _known(rows: Sequence[Row], name: str) -> list[Any]:
    return [row[name] for row in rows if row[name] is not None]


def _quantiles(values: Sequence[float]) -> dict[str, Any]:
    quantiles = {"p50": percentile(values, 50), "p90": percentile(values, 90), "max": max(values, default=None)}
    return {"count": len(values)} | {name: _rounded(value) for name, value in quantiles.items()}


def _rounded(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value
