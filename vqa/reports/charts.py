"""The charts of the pages, small enough to be read on a phone.

Their words are ours and in English, whatever the data says: text from a CSV or a path stands in the HTML, where the
browser has the glyphs. So no chart needs a font with Hangul.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vqa.evaluation.metrics import wilson_interval
from vqa.reports.diagnostics import Reliability

INK, SOFT, BARS = "#1b1f24", "#5b6470", "#8db4ee"


COLOURS = ("#2563c9", "#d97706", "#15803d", "#9333ea", "#b91c1c", "#0e7490")


STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.4,
}


def blank(title: str, across: str, up: str, height: float = 2.9):
    """(figure, its one pair of axes)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        axes = figure.subplots()
        axes.set(title=title, xlabel=across, ylabel=up)
    return figure, axes


def histogram(values: Mapping[str, Sequence[int]], title: str, across: str) -> Figure:
    """Shares of the rows by a whole number, a line for each name; the rarest hundredth at the top is cut off."""
    figure, axes = blank(title, across, "share of rows")
    top = max(int(np.quantile(v, 0.99)) for v in values.values()) + 1
    low = min(min(v) for v in values.values())
    step = max(1, -(-(top - low) // 30))
    edges = np.arange(low, top + step + 1, step) - 0.5
    for number, (name, some) in enumerate(values.items()):
        counts, _ = np.histogram(some, edges)
        name = name if name.isascii() else f"file {number + 1}"
        axes.stairs(counts / len(some), edges, color=COLOURS[number % len(COLOURS)], label=name, linewidth=1.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.legend(frameon=False)
    return figure


def image_sizes(sizes: np.ndarray, budgets: Sequence[int]) -> Figure:
    """Width against height of the images (images, 2), and what each pixel budget lets through unshrunk."""
    figure, axes = blank("image sizes; right of a curve an image is shrunk", "width, pixels", "height, pixels")
    different, counts = np.unique(sizes, axis=0, return_counts=True)
    area = 12 + 150 * counts / counts.max()
    axes.scatter(*different.T, s=area, color=COLOURS[0], alpha=0.5, linewidths=0, zorder=3)
    right, top = np.maximum(1.12 * different.max(0), 1.12 * min(budgets))  # the smallest budget is always in sight
    widths = np.linspace(right / 100, right, 300)
    for budget in budgets:
        heights = budget**2 / widths
        shown = heights <= top
        if shown.any():
            axes.plot(widths[shown], heights[shown], color=SOFT, linewidth=0.8)
            axes.annotate(str(budget), (widths[shown][-1], heights[shown][-1]), color=SOFT, ha="right", va="top")
    axes.set(xlim=(0, right), ylim=(0, top))
    return figure


def reliability_diagram(found: Reliability) -> Figure:
    """Accuracy against confidence, with the 95 % intervals of the bins; a dot's area goes by its rows."""
    figure, axes = blank("reliability", "confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=":")
    right = found.accuracy * found.rows
    low, high = np.array([wilson_interval(r, n) for r, n in zip(right, found.rows)]).T
    axes.vlines(found.confidence, low, high, color=COLOURS[0], linewidth=1)
    axes.plot(found.confidence, found.accuracy, color=COLOURS[0], linewidth=1)
    axes.scatter(
        found.confidence, found.accuracy, s=10 + 90 * found.rows / found.rows.max(), color=COLOURS[0], zorder=3
    )
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return figure


def learning_curves(curves: Mapping[str, Sequence[np.ndarray]], score: str) -> Figure:
    """A score of validation against the step: name of the weights -> an array (validations, 2) for each fold."""
    figure, axes = blank(f"{score} of validation; thin lines are folds", "step", score)
    for number, (name, folds) in enumerate(curves.items()):
        for fold in folds:
            axes.plot(*fold.T, color=COLOURS[number], linewidth=0.7, alpha=0.45)
        steps = sorted(set.intersection(*(set(fold[:, 0]) for fold in folds)))
        means = [np.mean([fold[fold[:, 0] == step, 1][0] for fold in folds]) for step in steps]
        axes.plot(steps, means, color=COLOURS[number], marker="o", markersize=3, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.legend(frameon=False)
    return figure
