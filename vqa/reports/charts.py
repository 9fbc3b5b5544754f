"""The charts of the pages. They are small enough for a phone, and hold no text from the data."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vqa.core.figures import COLOURS, GREY, new_figure
from vqa.evaluation.metrics import wilson_interval
from vqa.reports.diagnostics import Reliability


def histogram(values: Mapping[str, Sequence[int]], title: str, xlabel: str) -> Figure:
    """Fraction of rows by an integer value, one line for each name. The largest 1 % of the values are cut off."""
    figure, axes = new_figure(title, xlabel, "fraction of rows")
    top = max(int(np.quantile(v, 0.99)) for v in values.values()) + 1
    low = min(min(v) for v in values.values())
    step = max(1, -(-(top - low) // 30))
    edges = np.arange(low, top + step + 1, step) - 0.5
    for number, (name, numbers) in enumerate(values.items()):
        counts, _ = np.histogram(numbers, edges)
        label = name if name.isascii() else f"file {number + 1}"
        axes.stairs(counts / len(numbers), edges, color=COLOURS[number % len(COLOURS)], label=label, linewidth=1.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)  # outside: it hides no data
    return figure


def image_sizes(sizes: np.ndarray, budgets: Sequence[int]) -> Figure:
    """Width against height of the images (images, 2), with a curve for each pixel budget."""
    figure, axes = new_figure("image sizes; right of a curve an image is shrunk", "width, pixels", "height, pixels")
    unique, counts = np.unique(sizes, axis=0, return_counts=True)
    area = 12 + 150 * counts / counts.max()
    axes.scatter(unique[:, 0], unique[:, 1], s=area, color=COLOURS[0], alpha=0.5, linewidths=0, zorder=3)
    right, top = np.maximum(1.12 * unique.max(0), 1.12 * min(budgets))  # the smallest budget is always visible
    widths = np.linspace(right / 100, right, 300)
    for budget in budgets:
        heights = budget**2 / widths
        inside = heights <= top
        if inside.any():
            axes.plot(widths[inside], heights[inside], color=GREY, linewidth=0.8)
            axes.annotate(str(budget), (widths[inside][-1], heights[inside][-1]), color=GREY, ha="right", va="top")
    axes.set(xlim=(0, right), ylim=(0, top))
    return figure


def reliability_diagram(bins: Reliability) -> Figure:
    """Accuracy against confidence with 95 % intervals; the area of a dot is proportional to its rows."""
    figure, axes = new_figure("reliability", "confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    intervals = [wilson_interval(accuracy * rows, rows) for accuracy, rows in zip(bins.accuracy, bins.rows)]
    axes.vlines(bins.confidence, *np.array(intervals).T, color=COLOURS[0], linewidth=1)
    axes.plot(bins.confidence, bins.accuracy, color=COLOURS[0], linewidth=1)
    area = 10 + 90 * bins.rows / bins.rows.max()
    axes.scatter(bins.confidence, bins.accuracy, s=area, color=COLOURS[0], zorder=3)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return figure


def heat_map(values: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Values from 0 to 1 (names, names), each written into its cell."""
    side = max(2.9, 0.55 * len(names))
    figure, axes = new_figure(title, "", size=(side, side))
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    for row, column in np.ndindex(values.shape):
        colour = "white" if values[row, column] > 0.6 else "black"
        axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", color=colour)
    return figure


def learning_curves(curves: Mapping[str, Sequence[np.ndarray]], score: str) -> Figure:
    """A validation score against the step. `curves`: weights -> one array (validations, 2) for each fold."""
    figure, axes = new_figure(f"validation {score}; thin lines are folds", "step", score)
    for number, (name, folds) in enumerate(curves.items()):
        for fold in folds:
            axes.plot(*fold.T, color=COLOURS[number], linewidth=0.7, alpha=0.45)
        steps = sorted(set.intersection(*(set(fold[:, 0]) for fold in folds)))
        means = [np.mean([fold[fold[:, 0] == step, 1][0] for fold in folds]) for step in steps]
        axes.plot(steps, means, color=COLOURS[number], marker="o", markersize=3, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)  # outside: it hides no data
    return figure
