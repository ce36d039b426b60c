"""The report as tables: headings and lines of text, and rich tables of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_NONE = "-"


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table."""

    title: str
    headings: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]


def tables(report: dict[str, Any]) -> "Iterator[Table]":
    """Everything that the report holds, for the terminal."""
    from rich.table import Table

    for sheet in sheets(report):
        table = Table(*sheet.headings, title=sheet.title)
        for line in sheet.lines:
            table.add_row(*line)
        yield table


def sheets(report: dict[str, Any]) -> Iterator[Sheet]:
    """One sheet for each table of each part."""
    if "prefix" in report:
        yield _prefix_rows(report["prefix"])
        yield _prefix_ratios(report["prefix"])
    if "pruning" in report:
        yield _pruning_rows(report["pruning"])
        yield _pruning_ratios(report["pruning"])
        yield _capacities(report["pruning"])
        if any(row.get("tasks") for row in report["pruning"]["rows"]):
            yield _accuracy(report["pruning"])
    if "ablation" in report:
        yield _ablation_rows(report["ablation"])
        yield _ablation_gains(report["ablation"])
    if "soak" in report:
        yield _soak_rows(report["soak"])
    for part in ("prefix", "soak"):
        if report.get(part, {}).get("checks"):
            yield _checks(part, report[part]["checks"])


def _prefix_rows(part: dict[str, Any]) -> Sheet:
    columns = (
        ("overlap", lambda row: f"{row['overlap']:.0%}"),
        ("sharing", lambda row: row["sharing"]),
        ("hit ratio", lambda row: _percent(row["hit_ratio"])),
        *_SERVED,
        ("forward", lambda row: _percent(row["forward_share"])),
    )
    return _sheet("Prefix sharing", part["rows"], columns)


def _prefix_ratios(part: dict[str, Any]) -> Sheet:
    columns = (
        ("overlap", lambda row: f"{row['overlap']:.0%}"),
        *_RATIOS,
        ("forward", lambda row: _ratio(row["forward_share"])),
        ("windows", lambda row: str(row["pairs_per_s"]["num_pairs"])),
    )
    return _sheet("Prefix sharing: on / off (95 % interval)", part["on_over_off"], columns)


def _pruning_rows(part: dict[str, Any]) -> Sheet:
    columns = (
        ("fraction", lambda row: f"{row['fraction']:.0%}"),
        ("blocks freed", lambda row: _number(row["pruned_blocks"], 0)),
        ("requests pruned", lambda row: _number(row["pruned_requests"], 0)),
        ("preempted", lambda row: str(row["preemptions"])),
        ("KV use", lambda row: _percent(row["kv_use_mean"])),
        *_SERVED,
        ("errors", lambda row: str(row["num_errors"])),
    )
    return _sheet("KV pruning under memory pressure", part["rows"], columns)


def _pruning_ratios(part: dict[str, Any]) -> Sheet:
    columns = (("fraction", lambda row: f"{row['fraction']:.0%}"), *_RATIOS)
    return _sheet("KV pruning: over no pruning (95 % interval)", part["over_no_pruning"], columns)


def _capacities(part: dict[str, Any]) -> Sheet:
    contexts = [found["context_tokens"] for found in part["rows"][0]["capacity"]] if part["rows"] else []
    headings = ("fraction", *(f"{context} tokens" for context in contexts))
    lines = [
        (f"{row['fraction']:.0%}", *(f"{found['batch']}" for found in row["capacity"])) for row in part["rows"]
    ]
    return Sheet("Largest batch that runs at once, by context", headings, lines)


def _accuracy(part: dict[str, Any]) -> Sheet:
    kinds = sorted({kind for row in part["rows"] for kind in row.get("tasks", {})})
    headings = ("fraction", "log-prob drop, nats/token", *(f"{kind}: right answers" for kind in kinds))
    lines = [
        (
            f"{row['fraction']:.0%}",
            _interval(row.get("logprob_drop"), "mean", 3),
            *(_percent(row.get("tasks", {}).get(kind, {}).get("accuracy")) for kind in kinds),
        )
        for row in part["rows"]
    ]
    return Sheet("Accuracy after pruning", headings, lines)


def _ablation_rows(part: dict[str, Any]) -> Sheet:
    columns = (
        ("load", lambda row: f"{row['load']:g}"),
        ("setting", lambda row: row["setting"]),
        *_SERVED,
        ("preempted", lambda row: str(row["preemptions"])),
        ("hit ratio", lambda row: _percent(row["hit_ratio"])),
        ("blocks pruned", lambda row: _number(row["pruned_blocks"], 0)),
        ("KV use", lambda row: _percent(row["kv_use_mean"])),
    )
    return _sheet("Ablations under memory pressure", part["rows"], columns)


def _ablation_gains(part: dict[str, Any]) -> Sheet:
    columns = (
        ("load", lambda row: f"{row['load']:g}"),
        ("without", lambda row: row["setting"]),
        ("attainment lost, points", lambda row: _interval(row["attainment_gain"], "middle", 1, 100)),
        *_RATIOS,
    )
    return _sheet("Ablations: without / with all (95 % interval)", part["over_full"], columns)


def _soak_rows(part: dict[str, Any]) -> Sheet:
    counts, status = part["counts"], part["status"]
    lines = [
        ("minutes", f"{part['elapsed_s'] / 60:.1f}"),
        ("requests, errors", f"{part['requests']}, {len(part['errors'])}"),
        ("steps, failed", f"{part['steps']}, {len(part['failed_steps'])}"),
        ("pairs/s", _number(part["pairs_per_s"], 1)),
        ("KV use, mean and maximum", f"{_percent(counts['kv_use_mean'])}, {_percent(counts['kv_use_max'])}"),
        ("share of time at 95 % or more", _percent(part["share_of_time_full"])),
        ("preemptions", str(counts["preemptions"])),
        ("blocks pruned", _number(status.get("pruned_blocks"), 0)),
        ("TBT p50, p99", f"{_ms(part['tbt']['p50_s'])}, {_ms(part['tbt']['p99_s'])}"),
    ]
    for name, trend in part["rss"].items():
        if trend is not None:
            sizes = f"{trend['first_bytes'] / 2**20:.0f} to {trend['last_bytes'] / 2**20:.0f} MiB"
            slope = ", ".join(f"{trend[key] / 2**20:+.1f}" for key in ("low", "high"))
            lines.append((f"{name.removesuffix('_rss_bytes')}, last two thirds", f"{sizes}; {slope} MiB/h"))
    return Sheet("Soak", ("what", "value"), lines)


def _checks(part: str, checks: list[dict[str, Any]]) -> Sheet:
    verdicts = {True: "met", False: "missed", None: "not applicable"}
    lines = [(verdicts[check["passed"]], check["check"], _value(check)) for check in checks]
    return Sheet(f"Checks: {part}", ("verdict", "check", "value"), lines)


Column = tuple[str, Callable[[dict[str, Any]], str]]
"""Heading, and text of a row."""

_SERVED: tuple[Column, ...] = (
    ("attainment", lambda row: _number(row["pooled_slo_attainment"], 3)),
    ("TTFT p50", lambda row: _ms(row["ttft_p50_s"])),
    ("TTFT p99", lambda row: _ms(row["ttft_p99_s"])),
    ("TBT p50", lambda row: _ms(row["tbt_p50_s"])),
    ("TBT p99", lambda row: _ms(row["tbt_p99_s"])),
    ("pairs/s", lambda row: _number(row["pairs_per_s"], 1)),
)
_RATIOS: tuple[Column, ...] = (
    ("TTFT p50", lambda row: _ratio(row["ttft_p50_s"])),
    ("TTFT p99", lambda row: _ratio(row["ttft_p99_s"])),
    ("TBT p50", lambda row: _ratio(row["tbt_p50_s"])),
    ("TBT p99", lambda row: _ratio(row["tbt_p99_s"])),
    ("pairs/s", lambda row: _ratio(row["pairs_per_s"])),
)


def _sheet(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> Sheet:
    return Sheet(
        title, tuple(heading for heading, _ in columns), [tuple(text(r) for _, text in columns) for r in rows]
    )


def _value(check: dict[str, Any]) -> str:
    value = check["value"]
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    low, high = check.get("interval") or (None, None)
    return text if low is None or high is None else f"{text} ({low:.3g} to {high:.3g})"


def _ratio(ratio: dict[str, Any] | None) -> str:
    return _interval(ratio, "ratio", 2)


def _interval(found: dict[str, Any] | None, key: str, digits: int, factor: float = 1.0) -> str:
    if found is None:
        return _NONE
    text = f"{factor * found[key]:.{digits}f}"
    if found["low"] is None:
        return text
    return f"{text} ({factor * found['low']:.{digits}f} to {factor * found['high']:.{digits}f})"


def _ms(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{1e3 * seconds:.0f} ms"


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.1f} %"


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"
