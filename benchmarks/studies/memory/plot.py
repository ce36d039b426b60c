"""The picture of a report: gains by overlap, batches by pruning, ablations, and the soak's memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE_IN = (13, 9)
_DPI = 100
_BLUE, _ORANGE, _GREEN, _GREY, _SKY = "#0072B2", "#D55E00", "#009E73", "#777777", "#56B4E9"
"""Okabe and Ito: apart for the colour-blind too."""


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the PNG; parts that the report does not have stay empty.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_IN, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    panels = (("prefix", _prefix), ("pruning", _pruning), ("ablation", _ablation), ("soak", _soak))
    for panel, (part, drawing) in zip(axes.flat, panels, strict=True):
        if part in report:
            drawing(panel, report[part])
        else:
            panel.set_title(f"{part}: not measured", loc="left")
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
    rows = part["on_over_off"]
    for number, (name, title, colour) in enumerate(names):
        known = [(100 * row["overlap"] + number - 1, row[name]) for row in rows if row[name] is not None]
        if not known:
            continue
        xs, ratios = [x for x, _ in known], [ratio for _, ratio in known]
        middles = [ratio["ratio"] for ratio in ratios]
        below = [0 if r["low"] is None else r["ratio"] - r["low"] for r in ratios]
        above = [0 if r["high"] is None else r["high"] - r["ratio"] for r in ratios]
        axes.errorbar(xs, middles, yerr=[below, above], color=colour, marker="o", capsize=3, label=title)
    axes.axhline(1, color=_GREY, linewidth=1, linestyle="--")
    axes.set_xlabel("prompt tokens that are shared, %")
    axes.set_title("prefix sharing: on / off, 95 % intervals", loc="left")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    axes.grid(visible=True, axis="y", alpha=0.35)
    axes.legend(frameon=False, ncols=3, loc="upper center")


def _pruning(axes: "Axes", part: dict[str, Any]) -> None:
    """Largest batch over fraction, a group of bars for each context."""
    rows = part["rows"]
    contexts = [found["context_tokens"] for found in rows[0]["capacity"]] if rows else []
    width = 0.8 / max(1, len(rows))
    for number, (row, colour) in enumerate(zip(rows, (_GREY, _SKY, _BLUE, _ORANGE), strict=False)):
        heights = [found["batch"] for found in row["capacity"]]
        places = [place + (number - (len(rows) - 1) / 2) * width for place in range(len(heights))]
        bars = axes.bar(places, heights, width, color=colour, label=f"{row['fraction']:.0%} dropped")
        axes.bar_label(bars, fontsize=8)
    axes.set_xticks(range(len(contexts)), [f"{context}" for context in contexts])
    axes.set_xlabel("context of each request, tokens")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.set_title("requests that run at once in the same KV cache", loc="left")
    axes.legend(frameon=False, ncols=2, loc="upper right")


def _ablation(axes: "Axes", part: dict[str, Any]) -> None:
    """SLO attainment; dots are the repeats."""
    rows = part["rows"]
    loads = sorted({row["load"] for row in rows})
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    width = 0.8 / max(1, len(settings))
    for number, (setting, colour) in enumerate(zip(settings, (_ORANGE, _BLUE, _GREEN, _GREY), strict=False)):
        mine = [row for row in rows if row["setting"] == setting]
        places = [loads.index(row["load"]) + (number - (len(settings) - 1) / 2) * width for row in mine]
        axes.bar(places, [row["pooled_slo_attainment"] or 0 for row in mine], width, color=colour, label=setting)
        for place, row in zip(places, mine, strict=True):
            repeats = [repeat["metrics"]["slo_attainment"] for repeat in row["repeats"]]
            axes.plot([place] * len(repeats), repeats, "o", color="#222222", markersize=3)
    axes.set_xticks(range(len(loads)), [f"load × {load:g}" for load in loads])
    axes.set_ylim(0, 1.2)
    axes.set_title("SLO attainment under memory pressure (dots: repeats)", loc="left")
    axes.grid(visible=True, axis="y", alpha=0.35)
    axes.legend(frameon=False, ncols=4, loc="upper center")


def _soak(axes: "Axes", part: dict[str, Any]) -> None:
    """Resident memory of each process, and use of the KV cache."""
    series = part["series"]
    minutes = [reading["time_s"] / 60 for reading in series]
    names = [name for name in (series[0] if series else {}) if name.endswith("_rss_bytes")]
    for name, colour in zip(names, (_GREY, _BLUE, _ORANGE), strict=False):
        label = name.removesuffix("_rss_bytes").replace("_", " ")
        axes.plot(minutes, [reading[name] / 2**20 for reading in series], color=colour, label=label)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident memory, MiB")
    used = axes.twinx()
    used.plot(minutes, [100 * reading["kv_use"] for reading in series], color=_GREEN, linewidth=0.8, alpha=0.6)
    used.set_ylim(0, 120)
    used.set_ylabel("KV blocks in use, %", color=_GREEN)
    axes.set_title("soak: full KV cache, training on", loc="left")
    axes.legend(frameon=False, loc="lower right")
