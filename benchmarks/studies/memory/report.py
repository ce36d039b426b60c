"""A report of `mace bench memory` as tables and as a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks.harness.report import SERVED, Column, checks_table, digits, interval_of, ms, percent, table_of
from core.errors import ConfigError
from core.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE_IN = (13, 9)
_DPI = 100
_BLUE, _ORANGE, _GREEN, _GREY, _SKY = "#0072B2", "#D55E00", "#009E73", "#777777", "#56B4E9"
"""Okabe and Ito: apart for the colour-blind too."""
_BARS = (_GREY, _BLUE, _ORANGE, _SKY)

_KEYS: tuple[Column, ...] = (
    ("overlap", "overlap", "{:.0%}".format),
    ("sharing", "sharing", str),
    ("fraction", "fraction", "{:.0%}".format),
    ("load", "load", "{:g}".format),
    ("setting", "setting", str),
)
_FORWARD: Column = ("forward", "forward_share", percent)
_ROWS: tuple[Column, ...] = (
    *_KEYS,
    *SERVED,
    _FORWARD,
    ("hit ratio", "hit_ratio", percent),
    ("KV use", "kv_use_mean", percent),
    ("preempted", "preemptions", str),
    ("blocks freed", "pruned_blocks", digits(0)),
    ("requests pruned", "pruned_requests", digits(0)),
    ("errors", "num_errors", str),
)
_RATIOS: tuple[Column, ...] = (
    *_KEYS,
    ("attainment lost, points", "attainment_gain", interval_of("middle", 1, 100)),
    *((heading, key, interval_of("ratio")) for heading, key, _ in (*SERVED[1:], _FORWARD)),
    ("windows", "pairs_per_s", lambda ratio: str(ratio["num_pairs"])),
)
_PARTS = {
    "prefix": ("Prefix sharing", "on_over_off", "on / off"),
    "pruning": ("KV pruning under memory pressure", "over_no_pruning", "over no pruning"),
    "ablation": ("Ablations under memory pressure", "over_full", "without / with all"),
}
"""Title, key of the ratios and what they compare."""


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """Everything that the report holds, for the terminal."""
    for part, (title, ratios, compared) in _PARTS.items():
        if part in report:
            yield table_of(title, report[part]["rows"], _ROWS)
            yield table_of(f"{title}: {compared} (95 % interval)", report[part][ratios], _RATIOS)
    if "pruning" in report:
        yield from _pruning_tables(report["pruning"]["rows"])
    if "soak" in report:
        yield _soak_table(report["soak"])
    for part, found in report.items():
        if part in ("prefix", "soak") and found.get("checks"):
            yield checks_table(part, found["checks"])


def _pruning_tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """Capacity by context, and accuracy by kind of task."""
    batches = [{**row, **{found["context_tokens"]: found["batch"] for found in row["capacity"]}} for row in rows]
    contexts = [found["context_tokens"] for found in rows[0]["capacity"]]
    columns = [(f"{context} tokens", context, str) for context in contexts]
    yield table_of("Largest batch that runs at once, by context", batches, [*_KEYS, *columns])
    if right := [
        {**row, **{k: task["accuracy"] for k, task in row["tasks"].items()}} for row in rows if "tasks" in row
    ]:
        drop = ("log-prob drop, nats/token", "logprob_drop", interval_of("mean", 3))
        kinds = [(f"{kind}: right answers", kind, percent) for kind in sorted(right[0]["tasks"])]
        yield table_of("Accuracy after pruning", right, [*_KEYS, drop, *kinds])


def _soak_table(part: dict[str, Any]) -> Table:
    counts = part["counts"]
    table = Table("what", "value", title="Soak")
    for what, value in (
        ("minutes", f"{part['elapsed_s'] / 60:.1f}"),
        ("requests, errors", f"{part['requests']}, {len(part['errors'])}"),
        ("steps, failed", f"{part['steps']}, {len(part['failed_steps'])}"),
        ("pairs/s", f"{part['pairs_per_s']:.1f}"),
        ("KV use, mean and maximum", f"{counts['kv_use_mean'] or 0:.1%}, {counts['kv_use_max'] or 0:.1%}"),
        ("share of time at 95 % or more", percent(part["share_of_time_full"])),
        ("preemptions", str(counts["preemptions"])),
        ("blocks pruned", str(part["status"].get("pruned_blocks", "-"))),
        ("TBT p50, p99", ", ".join(ms(part["tbt"][key] or 0.0) for key in ("p50_s", "p99_s"))),
    ):
        table.add_row(what, value)
    for name, trend in part["rss"].items():
        if trend is not None:
            sizes = f"{trend['first_bytes'] / 2**20:.0f} to {trend['last_bytes'] / 2**20:.0f} MiB"
            slope = ", ".join(f"{trend[key] / 2**20:+.1f}" for key in ("low", "high"))
            table.add_row(f"{name.removesuffix('_rss_bytes')}, last two thirds", f"{sizes}; {slope} MiB/h")
    return table


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the PNG; parts that the report does not have stay empty.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = new_figure(_SIZE_IN)
    panels = (
        ("prefix", _prefix, "prefix sharing: on / off, 95 % intervals"),
        ("pruning", _pruning, "requests that run at once in the same KV cache"),
        ("ablation", _ablation, "SLO attainment under memory pressure (dots: repeats)"),
        ("soak", _soak, "soak: full KV cache, training on"),
    )
    for axes, (part, drawing, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axes.set_title(title if part in report else f"{part}: not measured", loc="left")
        if part in report:
            drawing(axes, report[part])
            axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
            axes.legend(frameon=False, ncols=4, loc="upper center", fontsize="small", columnspacing=1)
    try:
        figure.savefig(path, dpi=_DPI)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _prefix(axes: "Axes", part: dict[str, Any]) -> None:
    """Ratios with their intervals."""
    names = (
        ("ttft_p50_s", "TTFT p50", _BLUE),
        ("forward_share", "time in forward passes", _ORANGE),
        ("pairs_per_s", "pairs/s", _GREEN),
    )
    for number, (name, title, colour) in enumerate(names):
        known = [(100 * row["overlap"] + number - 1, row[name]) for row in part["on_over_off"] if row[name]]
        if not known:
            continue
        xs, ratios = zip(*known, strict=True)
        middles = [ratio["ratio"] for ratio in ratios]
        below = [0 if r["low"] is None else r["ratio"] - r["low"] for r in ratios]
        above = [0 if r["high"] is None else r["high"] - r["ratio"] for r in ratios]
        axes.errorbar(xs, middles, yerr=[below, above], color=colour, marker="o", capsize=3, label=title)
    axes.axhline(1, color=_GREY, linewidth=1, linestyle="--")
    axes.set_xlabel("prompt tokens that are shared, %")
    axes.grid(visible=True, axis="y", alpha=0.35)


def _bars(axes: "Axes", groups: list[str], series: dict[str, list[float]]) -> Iterator[Any]:
    """Draw groups of bars side by side; yield the container of bars of each series."""
    width = 0.8 / len(series)
    axes.set_xticks(range(len(groups)), groups)
    for number, ((label, heights), colour) in enumerate(zip(series.items(), _BARS, strict=False)):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(groups))]
        yield axes.bar(places, heights, width, color=colour, label=label)


def _pruning(axes: "Axes", part: dict[str, Any]) -> None:
    """Largest batch over fraction, a group of bars for each context."""
    contexts = [str(found["context_tokens"]) for found in part["rows"][0]["capacity"]]
    batches = {
        f"{row['fraction']:.0%} dropped": [found["batch"] for found in row["capacity"]] for row in part["rows"]
    }
    for bars in _bars(axes, contexts, batches):
        axes.bar_label(bars, fontsize=8)
    axes.set_xlabel("context of each request, tokens")


def _ablation(axes: "Axes", part: dict[str, Any]) -> None:
    """SLO attainment; dots are the repeats."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in part["rows"]:
        rows.setdefault(row["setting"], []).append(row)
    loads = [f"load × {row['load']:g}" for row in next(iter(rows.values()))]
    attained = {name: [row["pooled_slo_attainment"] or 0 for row in mine] for name, mine in rows.items()}
    for mine, bars in zip(rows.values(), _bars(axes, loads, attained), strict=True):
        for row, bar in zip(mine, bars, strict=True):
            repeats = [repeat["metrics"]["slo_attainment"] for repeat in row["repeats"]]
            axes.plot([bar.get_center()[0]] * len(repeats), repeats, "o", color="#222222", markersize=3)
    axes.grid(visible=True, axis="y", alpha=0.35)


def _soak(axes: "Axes", part: dict[str, Any]) -> None:
    """Resident memory of each process, and use of the KV cache."""
    series = part["series"]
    minutes = [reading["time_s"] / 60 for reading in series]
    names = [name for name in (series[0] if series else {}) if name.endswith("_rss_bytes")]
    for name, colour in zip(names, _BARS, strict=False):
        label = name.removesuffix("_rss_bytes").replace("_", " ")
        axes.plot(minutes, [reading[name] / 2**20 for reading in series], color=colour, label=label)
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident memory, MiB")
    used = axes.twinx()
    used.plot(minutes, [100 * reading["kv_use"] for reading in series], color=_GREEN, linewidth=0.8, alpha=0.6)
    used.set_ylim(0, 120)
    used.set_ylabel("KV blocks in use, %", color=_GREEN)
