"""The picture of a profile: how well the models fit what was measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.batch import ForwardShape
from core.errors import ProfileError
from core.figures import new_figure
from profiler.profile import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MS = 1e3
_POINTS = 60
_DOT: dict[str, Any] = {"s": 9, "alpha": 0.45, "linewidths": 0}

_Rows = list[tuple[int, float]]
"""Size and measured latency in seconds."""
_Group = tuple[str, _Rows, Callable[[int], float | None]]
"""Label, rows, and the fitted latency in seconds at a size."""


def draw_report(profile: Profile, path: Path) -> None:
    """Write four panels as PNG: forward scatter, prefill by context, decode by batch, slices by tokens.

    ProfileError: the picture cannot be written.
    """
    figure = new_figure((13, 10))
    origin, error = profile.origin, profile.forward_error
    figure.suptitle(
        f"{origin.model} on {origin.device}\nforward: median error {error.median:.1%}, p95 {error.p95:.1%} "
        f"on {error.num_rows} held-out passes",
        fontsize=12,
    )
    axes = figure.subplots(2, 2)
    _draw_scatter(axes[0][0], profile)
    title = "prefill of one chunk (dots measured, lines fitted)"
    _draw_groups(axes[0][1], title, "tokens of the chunk", _prefill_groups(profile))
    _draw_groups(axes[1][0], "decode", "requests in the batch", _decode_groups(profile))
    x_label = "tokens of the slice (the optimizer has none: drawn at 1)"
    _draw_groups(axes[1][1], "fine-tune slices", x_label, _slice_groups(profile))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ProfileError(f"cannot write {path}: {error.strerror}") from error


def _draw_scatter(axes: Axes, profile: Profile) -> None:
    """One dot for each forward pass; on the line the model is right."""
    groups: dict[str, list[tuple[float, float]]] = {"decode only": [], "prefill only": [], "both": []}
    for row in profile.samples.forward:
        shape = ForwardShape(*row[:5])
        name = "prefill only" if not shape.num_decode else "both" if shape.num_prefills else "decode only"
        groups[name].append((_MS * profile.latency.forward_s(shape), _MS * row[5]))
    for name, dots in groups.items():
        if dots:
            axes.scatter(*zip(*dots, strict=True), label=f"{name} ({len(dots)})", **_DOT)
    values = [value for dots in groups.values() for dot in dots for value in dot]
    ends = [min(values), max(values)]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.plot(ends, [1.2 * end for end in ends], color="black", linewidth=0.7, linestyle=":", label="±20 %")
    axes.plot(ends, [end / 1.2 for end in ends], color="black", linewidth=0.7, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="predicted [ms]", ylabel="measured [ms]")
    axes.set_title("forward pass, measured over predicted", fontsize=11)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def _draw_groups(axes: Axes, title: str, x_label: str, groups: Iterable[_Group]) -> None:
    """Dots and the fitted line of each group."""
    for number, (label, rows, fitted_s) in enumerate(groups):
        sizes = [max(1, size) for size, _ in rows]
        low, high = min(sizes), max(sizes)
        # Whole numbers, spaced for a logarithmic axis.
        line = sorted({round(low * (high / low) ** (step / _POINTS)) for step in range(_POINTS + 1)})
        axes.scatter(sizes, [_MS * latency_s for _, latency_s in rows], color=f"C{number}", **_DOT)
        axes.plot(
            line, [_MS * (fitted_s(size) or 0.0) for size in line], color=f"C{number}", linewidth=1.2, label=label
        )
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel=x_label, ylabel="latency [ms]")
    axes.set_title(title, fontsize=11)
    axes.grid(visible=True, which="major", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def _prefill_groups(profile: Profile) -> Iterable[_Group]:
    """Passes of one chunk only, by context, which is read off the attention count."""
    groups: dict[int, _Rows] = defaultdict(list)
    for num_decode, _, tokens, attention, chunks, latency_s, _ in profile.samples.forward:
        if num_decode == 0 and chunks == 1:
            groups[_bucket(max(0, round(attention / tokens - tokens / 2)))].append((tokens, latency_s))
    for start, rows in sorted(groups.items())[:6]:
        yield f"context {start}", rows, partial(_prefill_s, profile, start)


def _prefill_s(profile: Profile, start: int, num_tokens: int) -> float:
    return profile.latency.forward_s(ForwardShape().with_chunk(num_tokens, start))


def _decode_groups(profile: Profile) -> Iterable[_Group]:
    """Passes without a prompt, by mean context."""
    groups: dict[int, _Rows] = defaultdict(list)
    for num_decode, context, tokens, _, _, latency_s, _ in profile.samples.forward:
        if num_decode and not tokens:
            groups[_bucket(context // num_decode)].append((num_decode, latency_s))
    for context, rows in sorted(groups.items())[:8]:
        yield f"context ~{context}", rows, partial(_decode_s, profile, context)


def _decode_s(profile: Profile, context: int, num_decode: int) -> float:
    return profile.latency.forward_s(ForwardShape(num_decode, num_decode * context))


def _slice_groups(profile: Profile) -> Iterable[_Group]:
    for kind, rows in sorted(profile.samples.slices.items()):
        error = profile.slice_errors[kind]
        label = f"{kind.value} (error {error.median:.0%}, p95 {error.p95:.0%})"
        yield label, rows, partial(profile.latency.slice_s, kind)


def _bucket(context: int) -> int:
    """0, or the nearest power of two."""
    return 0 if context < 8 else 1 << round(math.log2(context))
