"""matplotlib figures in the project's style, drawn without a display and without pyplot's global state.

Text in figures is ours and in ASCII: text from a CSV or a path may need a font (Hangul) that matplotlib lacks.
"""

import io
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vqa.core.io import atomic_write

GREY = "#5b6470"
COLOURS = ("#2563c9", "#d97706", "#15803d", "#9333ea", "#b91c1c", "#0e7490")
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 1.4,
}


def new_figure(
    title: str, xlabel: str, ylabel: str = "", size: tuple[float, float] = (4.4, 2.9)
) -> tuple[Figure, Axes]:
    """(figure, its axes); `size` is width and height in inches."""
    with rc_context(STYLE):  # type: ignore[arg-type]  # it wants literal keys
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def save_figure(figure: Figure, path: str | Path) -> bytes:
    """Write a figure as a PNG file. Returns the file's bytes, which are the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return buffer.getvalue()
