"""Accuracy with its interval, and log-loss.

Rows about one image, or with one question, tend to be right or wrong together, so n of them say less than n
independent rows. Intervals are widened by the design effect: the variance of the mean over clusters (images,
questions) divided by its variance over independent rows (Kish 1965).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

EPS = float(np.finfo(float).eps)  # smaller probabilities count as this, as in scikit-learn's log_loss
NOISE = 0.05  # level of significance


class Accuracy(NamedTuple):
    """An accuracy in [0, 1], the bounds of its 95 % interval, and what the rows are clustered by, or None."""

    value: float
    low: float
    high: float
    by: str | None = None

    def __str__(self) -> str:
        by = f", clustered by {self.by}" if self.by else ""
        return f"{self.value:.4f} (95 % interval {self.low:.4f} to {self.high:.4f}{by})"


def row_log_loss(probabilities: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Log-loss of each row, in nats (rows,), of probabilities (rows, letters) against the answers' indices (rows,)."""
    width = probabilities.shape[1]
    offered = answers < width
    right = np.where(offered, probabilities[np.arange(len(answers)), np.where(offered, answers, 0)], 0.0)
    return -np.log(np.maximum(right, EPS))


def margins(probabilities: np.ndarray) -> np.ndarray:
    """Probability of the likeliest letter minus that of the second (rows,), of probabilities (rows, letters)."""
    second, first = np.sort(probabilities)[:, -2:].T
    return first - second


def soft_label_log_loss(probabilities: np.ndarray, soft_labels: np.ndarray) -> np.ndarray:
    """Cross-entropy, in nats (rows,), of probabilities (rows, letters) to soft labels (rows, 10)."""
    probabilities = np.pad(probabilities, ((0, 0), (0, soft_labels.shape[1] - probabilities.shape[1])))
    return -(soft_labels * np.log(np.maximum(probabilities, EPS))).sum(1)


def accuracy_and_log_loss(probabilities: np.ndarray, answers: np.ndarray | Sequence[int]) -> dict[str, float]:
    """{"accuracy", "log_loss"} of probabilities (rows, letters) against the answers' indices (rows,)."""
    indices = np.asarray(answers)
    return {
        "accuracy": float((probabilities.argmax(1) == indices).mean()),
        "log_loss": float(row_log_loss(probabilities, indices).mean()),
    }


def wilson_interval(right: float, rows: float, z: float = float(ndtri(0.975))) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy of `right` out of `rows`; effective rows need not be integers."""
    p = right / rows
    middle, spread = p + z * z / (2 * rows), z * np.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return float(max(0.0, (middle - spread) / scale)), float(min(1.0, (middle + spread) / scale))


def accuracy(correct: np.ndarray, clusters: Mapping[str, np.ndarray] | None = None) -> Accuracy:
    """Accuracy of `correct`, bool (rows,). `clusters` name -> cluster of each row (rows,), from 0 on.

    Among several clusterings the one with the widest interval is used.
    """
    value, rows = float(correct.mean()), len(correct)
    intervals = [Accuracy(value, *wilson_interval(correct.sum(), rows))]
    for name, codes in (clusters or {}).items():
        effective = rows / design_effect(correct, codes)
        z = float(stdtrit(codes.max(), 0.975))  # clusters - 1 degrees of freedom
        intervals.append(Accuracy(value, *wilson_interval(value * effective, effective, z), name))
    return max(intervals, key=lambda item: item.high - item.low)


def design_effect(values: np.ndarray, codes: np.ndarray) -> float:
    """How many rows count as one independent row, at least 1. `values` (rows,); `codes`: clusters (rows,), from 0."""
    rows, clusters = len(values), codes.max() + 1
    if not (spread := values.var()):  # no correlation can be measured: take the upper bound
        return rows / clusters
    sums = np.bincount(codes, values - values.mean())
    return max(1.0, float(clusters / (clusters - 1) * (sums**2).sum() / (rows * spread)))


def score_with_interval(
    probabilities: np.ndarray, answers: np.ndarray, clusters: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """{"rows", "low", "high", "accuracy", "log_loss", "chance"}; low and high bound the accuracy's 95 % interval."""
    _, low, high, _ = accuracy(probabilities.argmax(1) == answers, clusters)
    scores = {"rows": len(answers), "low": low, "high": high, "chance": chance_accuracy(probabilities)}
    return scores | accuracy_and_log_loss(probabilities, answers)


def chance_accuracy(probabilities: np.ndarray) -> float:
    """Mean accuracy of a draw among the choices that each row offers: those with a probability above 0."""
    return float((1 / (probabilities > 0).sum(-1)).mean())
