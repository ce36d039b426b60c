"""Figures of matplotlib that need no screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(size_in: tuple[float, float]) -> Figure:
    """An empty figure of this width and height in inches, whose parts keep out of each other's way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_in, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's name says; ConfigError if that cannot be."""
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write plot {path}: {error}") from error
