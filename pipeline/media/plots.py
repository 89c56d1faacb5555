"""Plots: one look for all of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind eyes, and by lightness in print.
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8c8c8c"
INK = "#222222"


def canvas(title: str, x: str, y: str, size: tuple[float, float] = (8.2, 6.4)) -> tuple[Figure, Axes]:
    """An empty plot with one title line, light axes and no box around it; no global state as pyplot would have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    axes.set_title(title, loc="left", fontsize=13, color=INK, pad=12, linespacing=1.35)
    axes.set_xlabel(x, fontsize=12, color=INK)
    axes.set_ylabel(y, fontsize=12, color=INK)
    axes.tick_params(labelsize=11, colors=INK, length=0)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure, axes


def save_png(figure: Figure, path: Path) -> None:
    """Write a plot with a palette of 96 colours: a third of the bytes, and the same bytes for the same plot."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    picture = Image.open(buffer).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    picture.save(path, format="PNG", optimize=True)
