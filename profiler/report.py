"""Pictures of a profile: how well the models fit what was measured."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.batch import ForwardShape
from core.errors import ProfileError
from profiler.profile import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MS = 1e3
_POINTS = 60
_DOT: dict[str, Any] = {"s": 9, "alpha": 0.45, "linewidths": 0}


def draw_report(profile: Profile, path: Path) -> None:
    """Write four panels as PNG: forward scatter, prefill by context, decode by batch, slices by tokens.

    Raises:
        ProfileError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    FigureCanvasAgg(figure)
    _title(figure, profile)
    axes = figure.subplots(2, 2)
    _draw_scatter(axes[0][0], profile)
    _draw_prefill(axes[0][1], profile)
    _draw_decode(axes[1][0], profile)
    _draw_slices(axes[1][1], profile)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ProfileError(f"cannot write {path}: {error.strerror}") from error


def _title(figure: "Figure", profile: Profile) -> None:
    origin, error = profile.origin, profile.forward_error
    figure.suptitle(
        f"{origin.model} on {origin.device}\nforward: median error {error.median:.1%}, p95 {error.p95:.1%} "
        f"on {error.num_rows} held-out passes",
        fontsize=12,
    )


def _finish(axes: "Axes", title: str, x_label: str, y_label: str = "latency [ms]", *, log: bool = True) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.grid(visible=True, which="major", alpha=0.3)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(fontsize=8, frameon=False)


def _draw_scatter(axes: "Axes", profile: Profile) -> None:
    """One dot for each forward pass; on the line the model is right."""
    names = ("decode only", "prefill only", "both")
    groups: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for row in profile.samples.forward:
        shape = ForwardShape(*row[:5])
        name = "both" if shape.num_decode and shape.num_prefills else "decode only"
        name = "prefill only" if not shape.num_decode else name
        groups[name][0].append(_MS * profile.latency.forward_s(shape))
        groups[name][1].append(_MS * row[5])
    for name, (predicted, measured) in groups.items():
        if predicted:
            axes.scatter(predicted, measured, label=f"{name} ({len(predicted)})", **_DOT)
    values = [value for pair in groups.values() for side in pair for value in side]
    ends = [min(values), max(values)]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.plot(ends, [1.2 * end for end in ends], color="black", linewidth=0.7, linestyle=":", label="±20 %")
    axes.plot(ends, [end / 1.2 for end in ends], color="black", linewidth=0.7, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(axes, "forward pass, measured over predicted", "predicted [ms]", "measured [ms]", log=False)


def _draw_prefill(axes: "Axes", profile: Profile) -> None:
    """Passes of one chunk only; the context is read off the attention count."""
    groups: dict[int, list[tuple[int, float]]] = {}
    for num_decode, _, tokens, attention, chunks, latency_s, _ in profile.samples.forward:
        if num_decode == 0 and chunks == 1:
            start = max(0, round(attention / tokens - tokens / 2))
            groups.setdefault(_bucket(start), []).append((tokens, latency_s))
    for number, (start, rows) in enumerate(sorted(groups.items())[:6]):
        color = f"C{number}"
        axes.scatter([n for n, _ in rows], [_MS * t for _, t in rows], color=color, **_DOT)
        tokens_of_line = _span([n for n, _ in rows])
        shapes = [ForwardShape(0, 0, n, n * (2 * start + n) // 2, 1) for n in tokens_of_line]
        line = [_MS * profile.latency.forward_s(shape) for shape in shapes]
        axes.plot(tokens_of_line, line, color=color, linewidth=1.2, label=f"context {start}")
    _finish(axes, "prefill of one chunk (dots measured, lines fitted)", "tokens of the chunk")


def _draw_decode(axes: "Axes", profile: Profile) -> None:
    groups: dict[int, list[tuple[int, float]]] = {}
    for num_decode, context, tokens, _, _, latency_s, _ in profile.samples.forward:
        if num_decode and not tokens:
            groups.setdefault(_bucket(context // num_decode), []).append((num_decode, latency_s))
    for number, (context, rows) in enumerate(sorted(groups.items())[:8]):
        color = f"C{number}"
        axes.scatter([n for n, _ in rows], [_MS * t for _, t in rows], color=color, **_DOT)
        batches = _span([n for n, _ in rows])
        line = [_MS * profile.latency.forward_s(ForwardShape(n, n * context)) for n in batches]
        axes.plot(batches, line, color=color, linewidth=1.2, label=f"context ~{context}")
    _finish(axes, "decode", "requests in the batch")


def _draw_slices(axes: "Axes", profile: Profile) -> None:
    for number, (kind, rows) in enumerate(sorted(profile.samples.slices.items())):
        color, error = f"C{number}", profile.slice_errors[kind]
        sizes = [max(1, n) for n, _ in rows]
        axes.scatter(sizes, [_MS * t for _, t in rows], color=color, **_DOT)
        span = _span(sizes)
        line = [_MS * (profile.latency.slice_s(kind, n) or 0.0) for n in span]
        label = f"{kind.value} (error {error.median:.0%}, p95 {error.p95:.0%})"
        axes.plot(span, line, color=color, linewidth=1.2, label=label)
    _finish(axes, "fine-tune slices", "tokens of the slice (the optimizer has none: drawn at 1)")


def _bucket(context: int) -> int:
    """0, or the nearest power of two."""
    return 0 if context < 8 else 1 << round(math.log2(context))


def _span(values: list[int]) -> list[int]:
    """Whole numbers from the least to the greatest, spaced for a logarithmic axis."""
    low, high = max(1, min(values)), max(1, *values, 1)
    return sorted({round(low * (high / low) ** (step / _POINTS)) for step in range(_POINTS + 1)})
